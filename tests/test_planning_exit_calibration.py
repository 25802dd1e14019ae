import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from cleave.deployment import build_policy, offline
from cleave.planning import (
    budgeted_batch,
    calibrate_accuracy_drop,
    calibrate_budget,
    cost_curve,
    fit_temperatures,
    measure,
)
from cleave.planning.threshold_search import (
    Table,
    _pair,
    _totals,
    at_least_right,
    geometric_shares,
    sweep,
    within_budget,
)

COSTS = [2, 5, 9, 16, 20]
KINDS = ["confidence", "entropy", "margin", "ensemble", "patience"]
BUDGETS = [5.5, 7.0, 8.5, 20.0]


def stored(exits=3, batch=12, classes=3, seed=0, dtype=torch.float64):
    """Logits that grow better from exit to exit, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (batch,), generator=generator)
    strength = torch.arange(1, exits + 1).view(-1, 1, 1) / 2
    noise = torch.randn(exits, batch, classes, generator=generator)
    return (2 * noise + 2 * strength * F.one_hot(labels, classes)).to(dtype), labels


def a_policy(kind, exits=3):
    return build_policy(kind, 1, exits=exits)


def outcome(policy, logits, labels, costs):
    """Number of right answers and total cost."""
    answers, index = offline(policy, logits)
    return int((answers.argmax(1) == labels).sum()), sum(costs[i] for i in index.tolist())


def shared_outcomes(policy, logits, labels, costs):
    """The outcome of every shared threshold that can make a difference."""
    if policy.kind == "patience":
        choices = range(1, len(logits))
    else:
        choices = [*sorted(set(policy.scores(logits)[:-1].flatten().tolist())), None]
    return {outcome(policy.with_thresholds([t] * (len(logits) - 1)), logits, labels, costs) for t in choices}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_shared_threshold_for_a_budget_equals_brute_force(kind, seed):
    logits, labels = stored(seed=seed)
    policy, costs = a_policy(kind), COSTS[:3]
    everything = shared_outcomes(policy, logits, labels, costs)
    for budget in BUDGETS:
        kept = [(right, -cost) for right, cost in everything if cost <= 12 * budget]
        if not kept:
            with pytest.raises(ValueError, match="least possible"):
                calibrate_budget(policy, logits, labels, costs, budget, shared=True)
            continue
        found = calibrate_budget(policy, logits, labels, costs, budget, shared=True)
        assert outcome(found.policy, logits, labels, costs) == (max(kept)[0], -max(kept)[1])
        assert (found.accuracy * 12, found.cost * 12) == pytest.approx((max(kept)[0], -max(kept)[1]))
        assert (found.scheme, found.budget) == ("shared", budget)
        assert len(set(found.policy.thresholds)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [0, 0.1, 0.5])
def test_shared_threshold_for_an_accuracy_drop_equals_brute_force(kind, drop):
    logits, labels = stored(seed=3)
    policy, costs = a_policy(kind), COSTS[:3]
    last = outcome(policy.with_thresholds([None, None]), logits, labels, costs)[0]
    kept = [
        (-cost, right) for right, cost in shared_outcomes(policy, logits, labels, costs) if right >= last - 12 * drop
    ]
    found = calibrate_accuracy_drop(policy, logits, labels, costs, drop, shared=True)
    assert outcome(found.policy, logits, labels, costs) == (max(kept)[1], -max(kept)[0])
    assert found.budget is None


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_thresholds_per_exit_beat_the_shared_one_and_every_pair_of_quantiles(kind):
    logits, labels = stored(batch=40, seed=1)
    policy, costs = a_policy(kind), COSTS[:3]
    scores = policy.scores(logits)[:2].numpy() * (1 if policy.rising else -1)
    quantiles = [[*np.quantile(own, [0, 0.25, 0.5, 0.75], method="higher"), np.inf] for own in scores]
    pairs = [[None if np.isinf(t) else abs(float(t)) for t in pair] for pair in itertools.product(*quantiles)]
    outcomes = [outcome(policy.with_thresholds(pair), logits, labels, costs) for pair in pairs]
    for budget in (2, *BUDGETS):
        shared = calibrate_budget(policy, logits, labels, costs, budget, shared=True)
        found = calibrate_budget(policy, logits, labels, costs, budget)
        best = max(right for right, cost in outcomes if cost <= 40 * budget)
        assert found.cost <= budget * (1 + 1e-12)
        assert found.accuracy >= max(shared.accuracy, best / 40) - 1e-12
    for drop in (0, 0.1):
        needed = measure(policy.with_thresholds([None, None]), logits, labels, costs).accuracy - drop
        shared = calibrate_accuracy_drop(policy, logits, labels, costs, drop, shared=True)
        found = calibrate_accuracy_drop(policy, logits, labels, costs, drop)
        best = min(cost for right, cost in outcomes if right >= 40 * needed - 1e-9)
        assert found.accuracy >= needed - 1e-12
        assert found.cost <= min(shared.cost, best / 40) + 1e-12


def test_a_sharp_case_needs_thresholds_of_their_own():
    # The first exit is sure and wrong where the second is less sure and right: one threshold cannot serve both.
    first = torch.tensor([[3.0, 0.0]] * 4 + [[2.0, 0.0]] * 4)
    second = torch.tensor([[0.0, 1.0]] * 4 + [[1.0, 0.0]] * 4)
    last = torch.tensor([[0.0, 1.0]] * 4 + [[1.0, 0.0]] * 4)
    logits, labels = torch.stack([first, second, last]), torch.tensor([1] * 4 + [0] * 4)
    shared = calibrate_budget(a_policy("confidence"), logits, labels, [1, 2, 9], 2, shared=True)
    found = calibrate_budget(a_policy("confidence"), logits, labels, [1, 2, 9], 2)
    assert shared.accuracy == 0.5
    assert (found.accuracy, found.cost, found.shares) == (1, 2, (0, 1, 0))
    assert found.policy.thresholds[0] is None


def a_table(exits=5, batch=30):
    generator = np.random.default_rng(0)
    right = generator.integers(0, 2, (exits, batch))
    scores = generator.integers(0, 8, (exits - 1, batch)) / 8  # with ties
    return Table(scores, right, np.array(COSTS[:exits], dtype=float))


def test_all_combinations_of_a_pair_equal_brute_force():
    table, grid = a_table(), np.array([0, 0.25, 0.6, np.inf])
    levels, chosen = grid.searchsorted(table.scores, "right"), np.array([3, 2, 1, 2])
    for e, f in itertools.combinations(range(4), 2):
        right, cost = _pair(table, levels, chosen, e, f, [4] * 4)
        for i, j in itertools.product(range(4), repeat=2):
            thresholds = grid[chosen]
            thresholds[[e, f]] = grid[[i, j]]
            expected = _totals(table, thresholds[None])
            assert (right[i, j], cost[i, j]) == (expected[0][0], expected[1][0])


def test_the_sweep_equals_one_threshold_at_a_time_where_scores_are_equal():
    table = a_table()
    swept = sweep(table)
    right, cost = _totals(table, np.repeat(swept.thresholds[:, None], 4, axis=1))
    every = np.unique([*table.scores.ravel(), np.inf])
    everything = zip(*_totals(table, np.repeat(every[:, None], 4, axis=1)), strict=True)
    assert {*everything} == {*zip(swept.right, swept.cost, strict=True)}
    assert swept.right.tolist() == right.tolist()
    assert swept.cost.tolist() == cost.tolist()
    assert (swept.shares.sum(0) == 30).all()


def test_among_equals_a_goal_takes_the_cheaper_or_the_more_accurate():
    right, cost = np.array([5.0, 7, 7, 6]), np.array([4.0, 8, 6, 4])
    budget, accuracy = within_budget(a_table(), 8 / 30), at_least_right(5)
    assert (budget(right, cost), accuracy(right, cost)) == (2, 3)
    assert (within_budget(a_table(), 0.1)(right, cost), at_least_right(8)(right, cost)) == (None, None)


@pytest.mark.parametrize("budget", [2.0, 2.001, 4.7, 10.4, 15.0, 19.999, 20.0])
def test_geometric_shares_spend_the_budget_and_fall_by_one_ratio(budget):
    shares = geometric_shares(np.array(COSTS, dtype=float), budget)
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    assert shares @ COSTS == pytest.approx(budget, rel=1e-9)
    if 2.001 <= budget < 19.9:
        ratios = shares[1:] / shares[:-1]
        assert ratios == pytest.approx(np.full(4, ratios[0]), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("budget", [2.0, 4.7, 10.4, 15.0, 30.0])
def test_budgeted_batch_lets_the_asked_shares_leave(kind, budget):
    logits, labels = stored(exits=5, batch=101)
    found = budgeted_batch(a_policy(kind, 5), logits, labels, COSTS, budget)
    asked = geometric_shares(np.array(COSTS, dtype=float), budget)
    assert np.abs(np.array(found.shares) - asked).max() <= 1 / 101
    assert found.cost <= budget * (1 + 1e-12)
    assert found.scheme == "budgeted_batch"


def test_the_least_budget_is_kept_however_it_was_rounded():
    logits, labels = stored()
    budget = 1 / 49 * 49  # the least possible, as a share of the backbone's
    assert budget < 1
    assert budgeted_batch(a_policy("confidence"), logits, labels, [1, 20, 49], budget).shares == (1, 0, 0)


def test_budgeted_batch_keeps_the_budget_where_all_scores_are_equal():
    logits, labels = torch.zeros(3, 8, 2), torch.zeros(8, dtype=torch.int64)
    found = budgeted_batch(a_policy("confidence"), logits, labels, [1, 2, 3], 2)
    assert (found.shares, found.cost) == ((1, 0, 0), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_of_the_curve_is_what_its_thresholds_do(kind):
    logits, labels = stored(exits=4, batch=30, dtype=torch.float32)
    policy, costs = a_policy(kind, 4), COSTS[:4]
    curve = cost_curve(policy, logits, labels, costs, points=7)
    assert len(curve) == (3 if kind == "patience" else 7)
    assert (np.diff([point.cost for point in curve]) >= 0).all()
    assert curve[-1].shares == (0, 0, 0, 1)
    if kind != "patience":
        assert curve[0].shares == (1, 0, 0, 0)
    for point in curve:
        expected = measure(policy.with_thresholds(point.thresholds), logits, labels, costs)
        assert (point.accuracy, point.cost) == pytest.approx((expected.accuracy, expected.cost), rel=1e-12)
        assert point.shares == pytest.approx(expected.shares)


def test_a_curve_of_thresholds_per_exit_is_calibrated_at_even_budgets():
    logits, labels = stored(exits=4, batch=30)
    policy, costs = a_policy("margin", 4), COSTS[:4]
    curve = cost_curve(policy, logits, labels, costs, points=3, shared=False)
    found = [calibrate_budget(policy, logits, labels, costs, budget) for budget in (2, 9, 16)]
    assert [point.thresholds for point in curve] == [one.policy.thresholds for one in found]


def test_temperatures_of_the_policy_are_kept_and_looked_through():
    logits, labels = stored()
    policy = a_policy("confidence").with_temperatures([2.0, 0.5, 3.0])
    found = calibrate_budget(policy, logits, labels, COSTS[:3], 6)
    scaled = calibrate_budget(
        a_policy("confidence"), logits / torch.tensor([2, 0.5, 3]).view(-1, 1, 1), labels, COSTS[:3], 6
    )
    assert found.policy.temperatures == (2.0, 0.5, 3.0)
    assert found.shares == scaled.shares
    assert found.policy.thresholds == pytest.approx(scaled.policy.thresholds)


@pytest.mark.parametrize("scale", [0.3, 1, 20])
def test_temperatures_minimise_the_likelihood_of_each_exit(scale):
    logits, labels = stored(batch=200, classes=5, dtype=torch.float64)
    logits = scale * logits
    for own, found in zip(logits, fit_temperatures(logits, labels), strict=True):
        temperature = torch.tensor(found, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(own / temperature, labels), temperature)
        assert abs(gradient.item()) < 1e-12
        reference = minimize_scalar(
            lambda log_t, own=own: F.cross_entropy(own / np.exp(log_t), labels).item(), bracket=(-1, 3), tol=1e-10
        )
        assert found == pytest.approx(np.exp(reference.x), rel=1e-6)


def test_the_temperature_of_two_classes_is_known_in_closed_form():
    # Sure by 6 and right in 9 of 10: softmax(6 / T) = 0.9 at 6 / T = log 9.
    logits = torch.tensor([[[6.0, 0.0]] * 10])
    assert fit_temperatures(logits, torch.tensor([0] * 9 + [1])) == pytest.approx([6 / np.log(9)], rel=1e-12)


def test_a_temperature_without_an_optimum_stays_in_its_bounds():
    logits = torch.tensor([[[1.0, 0.0]] * 4])
    assert fit_temperatures(logits, torch.zeros(4, dtype=torch.int64)) == pytest.approx([0.05])
    assert fit_temperatures(logits, torch.ones(4, dtype=torch.int64)) == pytest.approx([100])


def nan(logits):
    broken = logits.clone()
    broken[1, 0, 0] = float("nan")
    return broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1.9}, r"least possible mean cost is 2;"),
        ({"budget": float("nan")}, "budget must be a number"),
        ({"split": "test"}, "thresholds are calibrated on validation data"),
        ({"split": "Test"}, 'split says where the logits are from, "val" or "train"'),
        ({"costs": [2, 5]}, "costs must be 3 numbers"),
        ({"costs": [2, 5, 5]}, "rise from exit to exit"),
        ({"costs": [0, 5, 6]}, "positive"),
        ({"logits": nan}, "logits of exit 1 hold NaN"),
        ({"logits": lambda x: x[0]}, r"logits must be floats \(E, B, C\)"),
        ({"logits": lambda x: x[:, :0]}, r"logits must be floats \(E, B, C\)"),
        ({"logits": lambda x: x.long()}, r"logits must be floats \(E, B, C\)"),
        ({"logits": lambda x: x[:2], "costs": [2, 5]}, "logits hold 2 exits, the policy is for 3"),
        ({"logits": lambda x: x[:1], "costs": [2]}, "logits hold one exit"),
        ({"labels": lambda y: y[:5]}, r"labels must be int64 \(12,\)"),
        ({"labels": lambda y: y.float()}, r"labels must be int64 \(12,\)"),
        ({"labels": lambda y: y + 1}, "labels must be in 0 to 2"),
    ],
)
def test_calibration_refuses(change, message):
    logits, labels = stored()
    given = {"costs": COSTS[:3], "budget": 7.0, **change}
    given["logits"] = change.get("logits", lambda x: x)(logits)
    given["labels"] = change.get("labels", lambda y: y)(labels)
    for calibrate in (calibrate_budget, budgeted_batch):
        if "least possible mean" in message and calibrate is budgeted_batch:
            message = "least possible is 2;"
        with pytest.raises(ValueError, match=message):
            calibrate(a_policy("confidence"), **given)
    if "budget" not in change:
        given.pop("budget")
        with pytest.raises(ValueError, match=message):
            calibrate_accuracy_drop(a_policy("confidence"), drop=0.1, **given)


def test_further_refusals():
    logits, labels = stored()
    for drop in (-0.01, 1.5, float("nan")):
        with pytest.raises(ValueError, match="drop must be from 0 to 1"):
            calibrate_accuracy_drop(a_policy("confidence"), logits, labels, COSTS[:3], drop)
    with pytest.raises(ValueError, match="deadline at exit 1; calibrate it first"):
        cost_curve(a_policy("confidence").with_deadline(5, COSTS[:3]), logits, labels, COSTS[:3])
    with pytest.raises(ValueError, match="use calibrate_budget"):
        budgeted_batch(a_policy("patience"), logits, labels, COSTS[:3], 6)
    with pytest.raises(ValueError, match="validation data"):
        cost_curve(a_policy("confidence"), logits, labels, COSTS[:3], shared=False, split="test")
    with pytest.raises(ValueError, match="points must be"):
        cost_curve(a_policy("confidence"), logits, labels, COSTS[:3], points=1)
    with pytest.raises(ValueError, match="validation data"):
        fit_temperatures(logits, labels, split="test")
