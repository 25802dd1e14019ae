import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from cleave.deployment import build_policy
from cleave.planning import (
    CurvePoint,
    accuracy_at,
    calibration_error,
    exit_accuracy,
    expected_excess,
    measure,
    overthinking,
)

COSTS = [1.5, 4, 7]


def stored(batch=400, classes=4):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, batch, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (batch,), generator=generator)


@pytest.mark.parametrize("bins", [1, 15])
def test_calibration_error_equals_torchmetrics(bins):
    logits, labels = stored()
    expected = [multiclass_calibration_error(own.softmax(1), labels, 4, n_bins=bins).item() for own in logits]
    assert calibration_error(logits, labels, bins) == pytest.approx(expected, rel=1e-6)


def test_a_certain_exit_has_no_calibration_error_where_it_is_right():
    logits = torch.tensor([[[900.0, 0.0]] * 4])  # a confidence of exactly 1, at the edge of the last bin
    assert calibration_error(logits, torch.tensor([0, 0, 0, 1])) == (0.25,)


def test_a_confidence_at_the_edge_of_two_bins_belongs_to_the_lower_one():
    logits = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)  # confidences of 1/2 and σ(1)
    sure = 1 / (1 + np.exp(-1))
    expected = (abs(0 - 0.5) + abs(1 - sure)) / 2
    assert calibration_error(logits, torch.tensor([1, 0]), bins=2) == pytest.approx([expected])


def test_overthinking_equals_a_loop_over_samples():
    logits, labels = stored()
    early_wrong_late = confirmed = ever = cost = 0
    for b, label in enumerate(labels):
        right = [int(logits[e, b].argmax()) == int(label) for e in range(3)]
        early_wrong_late += any(right[:2]) and not right[2]
        confirmed += any(right[:2]) and right[2]
        ever += any(right)
        cost += COSTS[right.index(True)] if any(right) else COSTS[2]
    found = overthinking(logits, labels, COSTS)
    assert found.destructive == early_wrong_late / 400
    assert found.wasteful == confirmed / 400
    assert found.oracle_accuracy == ever / 400
    assert found.oracle_cost == pytest.approx(cost / 400)
    assert found.oracle_accuracy >= max(exit_accuracy(logits, labels))


def test_accuracy_of_each_exit_and_of_a_policy():
    logits, labels = stored()
    answers = logits.numpy().argmax(2)
    assert exit_accuracy(logits, labels) == tuple((answers == labels.numpy()).mean(1))
    index = np.where(logits.softmax(2).amax(2)[:2].numpy() >= 0.7, 1, 0)
    index = np.concatenate([index, np.ones((1, 400), int)]).argmax(0)
    found = measure(build_policy("confidence", 0.7, exits=3), logits, labels, COSTS)
    assert found.accuracy == (answers[index, np.arange(400)] == labels.numpy()).mean()
    assert found.cost == pytest.approx(np.array(COSTS)[index].mean())
    assert found.shares == tuple(np.bincount(index, minlength=3) / 400)
    assert found.thresholds == (0.7, 0.7)


def test_accuracy_at_fractions_takes_the_best_that_is_cheap_enough():
    points = [(1.0, 0.5), (2.0, 0.8), (3.0, 0.7), (4.0, 0.9)]
    curve = [CurvePoint((None,), accuracy, cost, (0.0, 1.0)) for cost, accuracy in points]
    assert accuracy_at(curve, [0.1, 0.25, 0.75, 1], backbone=4) == [None, 0.5, 0.8, 0.9]


def test_refusals():
    logits, labels = stored()
    point = CurvePoint((None,), 0.5, 1.0, (0.0, 1.0))
    refused = [
        (lambda: calibration_error(logits, labels, bins=0), "bins must be a whole number"),
        (lambda: exit_accuracy(logits, labels[:3]), r"labels must be int64 \(400,\)"),
        (lambda: overthinking(logits * torch.inf, labels, COSTS), "logits of exit 0 hold NaN or infinity"),
        (lambda: overthinking(logits, labels, [3, 2, 1]), "rise from exit to exit"),
        (lambda: measure(build_policy("confidence", 0.7, exits=3), logits, labels, [1, 2]), "costs must be 3"),
        (lambda: accuracy_at([], [1], 4), "curve holds no points"),
        (lambda: accuracy_at([point], [0], 4), "must be above 0"),
        (lambda: accuracy_at([point], [1], 0), "must be above 0"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("calibrated", "tested"), [(300, 300), (500, 2000)])
@pytest.mark.parametrize("slack", [0.0, 0.05])
def test_the_expected_excess_is_that_of_many_draws(calibrated, tested, slack):
    """Samples of calibration and of the test are drawn again and again; the budget is what the former cost or more."""
    rng = np.random.default_rng(0)
    costs, shares = np.array([1.0, 3.0, 8.0]), np.array([0.5, 0.3, 0.2])
    drawn = [rng.multinomial(n, shares, 20_000) @ costs / n for n in (calibrated, tested)]
    found = expected_excess(shares.tolist(), costs.tolist(), shares @ costs + slack, calibrated, tested)
    assert found.error == pytest.approx((drawn[1] - drawn[0]).std(), rel=0.03)
    excess = np.maximum(0, drawn[1] - drawn[0] - slack).mean()
    assert found.expected == pytest.approx(excess, rel=0.05)


def test_where_all_leave_at_one_exit_a_budget_is_sure():
    found = expected_excess([1.0, 0.0], [2.0, 5.0], 2.0, 10, 10)
    assert (found.error, found.expected) == (0.0, 0.0)
    with pytest.raises(ValueError, match="got 1 shares, 2 costs"):
        expected_excess([1.0], [2.0, 5.0], 2.0, 10, 10)
