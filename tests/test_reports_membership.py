"""Figures of membership inference against scikit-learn, brute force and formulas in double precision."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from cleave.reports.attacks.membership import (
    area,
    judged,
    losses,
    margins,
    modified_entropies,
    true_positives,
)


def scores(seed, ties, members=150, others=210):
    torch.manual_seed(seed)
    found = torch.randn(members, dtype=torch.float64) + 0.7, torch.randn(others, dtype=torch.float64)
    return tuple(each.round(decimals=1) for each in found) if ties else found


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("others", [40, 100, 210])
def test_area_and_true_positives_equal_scikit_learn_and_brute_force(ties, others):
    inside, outside = scores(others, ties, others=others)
    truth, all_scores = np.r_[np.ones(len(inside)), np.zeros(others)], torch.cat([inside, outside]).numpy()
    assert area(inside, outside).item() == pytest.approx(roc_auc_score(truth, all_scores), abs=1e-12)
    brute = np.mean([(i > o) + 0.5 * (i == o) for i in inside.tolist() for o in outside.tolist()])
    assert area(inside, outside).item() == pytest.approx(brute, abs=1e-12)
    false, true, _ = roc_curve(truth, all_scores, drop_intermediate=False)
    for most in (0.0, 0.01, 0.05, 0.5, 1.0):
        assert true_positives(inside, outside, most).item() == pytest.approx(true[false <= most + 1e-12].max())


def test_modified_entropy_equals_its_formula_in_double_precision_and_stays_finite():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 6, dtype=torch.float64) * 4, torch.randint(6, (50,))
    shares = logits.softmax(1)
    for row in range(50):
        p, y = shares[row].tolist(), int(labels[row])
        wanted = -(1 - p[y]) * np.log(p[y]) - sum(q * np.log(1 - q) for i, q in enumerate(p) if i != y)
        assert modified_entropies(logits, labels)[row].item() == pytest.approx(wanted, rel=1e-9)
        assert losses(logits, labels)[row].item() == pytest.approx(-np.log(p[y]), rel=1e-9)
        assert margins(logits, labels)[row].item() == pytest.approx(np.log(p[y]) - np.log(1 - p[y]), rel=1e-7)
    sure = torch.tensor([[90.0, 0.0], [90.0, 0.0]])
    right, wrong = modified_entropies(sure, torch.tensor([0, 1])).tolist()
    assert right == pytest.approx(0, abs=1e-30)
    assert wrong == pytest.approx(180, rel=1e-6)  # −log p of the label and the other's log of what is left
    assert margins(sure, torch.tensor([0, 1])).tolist() == [90, -90]


def test_intervals_hold_what_is_known_and_grow_with_fewer_images():
    torch.manual_seed(1)
    held, widths = 0, []
    for seed in range(40):
        found = judged("a", *scores(seed, False, 300, 300), resamples=200, seed=seed)
        held += found.auc.low <= 0.6897 <= found.auc.high  # of a shift of 0.7: Φ(0.7 / √2)
        widths.append(found.auc.high - found.auc.low)
    assert held >= 33
    few = judged("a", *scores(0, False, 30, 30), resamples=200)
    assert few.auc.high - few.auc.low > 2 * np.mean(widths)
    assert few.tpr.low <= few.tpr.value <= few.tpr.high


@pytest.mark.parametrize(
    ("members", "others", "resamples"), [(torch.ones(0), torch.ones(2), 5), (torch.ones(2), torch.ones(2), 0)]
)
def test_nothing_to_judge_is_refused(members, others, resamples):
    with pytest.raises(ValueError, match="membership takes members, others and resamples"):
        judged("a", members, others, resamples)


def test_a_network_that_diverged_is_named():
    with pytest.raises(ValueError, match="scores of loss are NaN"):
        judged("loss", torch.tensor([float("nan")]), torch.ones(2), 5)
