import numpy as np
import pytest
import torch

from cleave.deployment import build_policy
from cleave.losses import fit_geometric_ensemble
from cleave.planning import exit_accuracy, fit_ensemble, worse_than_exits
from cleave.planning.stored_logits import decisions


def stored(exits=4, samples=600, classes=5, seed=0):
    """Logits of exits that know more and more, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes).float()
    noise = torch.randn(exits, samples, classes, generator=generator)
    strength = torch.linspace(0.5, 2.0, exits).view(-1, 1, 1)
    return 2 * (strength * signal + noise), labels


def slopes(logits, labels, weights, bias, ridge):
    """The gradient of the objective by w and log b in closed form, in float64."""
    shifted = logits - logits.max(2, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(2, keepdims=True))
    answer = np.tensordot(weights, log_p, 1) + bias
    q = np.exp(answer - answer.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    off = q - np.eye(q.shape[1])[labels]
    by_w = np.array([(off * own).sum(1).mean() for own in log_p]) + ridge * (weights - 1 / len(weights))
    return by_w, off.mean(0) + ridge * bias


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge", [1e-4, 1e-2])
def test_the_fit_is_the_optimum_of_its_convex_objective(seed, ridge):
    """Where a weight is above 0 the slope is 0, and else it points below: enough for a convex function's minimum."""
    logits, labels = stored(seed=seed)
    weights, log_bias = fit_geometric_ensemble(logits, labels, ridge)
    for m in range(len(logits)):
        w, b = weights[m, : m + 1].numpy(), log_bias[m].numpy()
        by_w, by_b = slopes(logits[: m + 1].double().numpy(), labels.numpy(), w, b, ridge)
        assert np.abs(by_b).max() < 1e-5
        assert np.abs(by_w[w > 1e-3]).max() < 1e-4
        assert (by_w[w <= 1e-3] > -1e-4).all()
    assert torch.equal(weights, weights.tril())


def test_it_is_at_least_as_likely_as_the_plain_mean_and_as_any_nearby():
    logits, labels = stored()
    fitted = fit_geometric_ensemble(logits, labels, ridge=1e-9)

    def loss(weights, bias):
        policy = build_policy("ensemble", exits=len(logits), weights=weights.tolist(), log_bias=bias.tolist())
        answers = decisions(policy, logits.double()).answers
        return torch.stack([torch.nn.functional.cross_entropy(own, labels) for own in answers])

    best = loss(*fitted)
    mean = torch.arange(1, 5).reciprocal().double().unsqueeze(1).expand(4, 4).tril()
    assert (best <= loss(mean, torch.zeros(4, 5))).all()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weights = fitted[0] * (1 + 0.1 * torch.randn(4, 4, generator=generator).clamp(-2, 2))
        bias = fitted[1] + 0.1 * torch.randn(4, 5, generator=generator)
        assert (best <= loss(weights, bias) + 1e-9).all()


@pytest.mark.parametrize("last", [True, False])
def test_a_policy_is_fitted_with_its_temperatures(last):
    logits, labels = stored(exits=3)
    temperatures = [2.0, 0.5, 1.0]
    policy = build_policy("ensemble", 0.9, exits=3, temperatures=temperatures, last=last)
    found = fit_ensemble(policy, logits, labels)
    assert (found.thresholds, found.temperatures, found.last) == (policy.thresholds, policy.temperatures, last)
    weights, _ = fit_geometric_ensemble(logits / torch.tensor(temperatures).view(-1, 1, 1), labels)
    torch.testing.assert_close(torch.tensor(found.weights, dtype=torch.float64), weights, atol=1e-3, rtol=1e-3)


def test_ensembles_that_are_worse_than_their_exits_are_named():
    logits, labels = stored(exits=3)
    logits[0] = 30 * torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(9))  # sure, and a guess
    policy = build_policy("ensemble", exits=3)
    own, together = exit_accuracy(logits, labels), exit_accuracy(decisions(policy, logits).answers, labels)
    worse = [(m, together[m], own[m]) for m in range(3) if together[m] < own[m]]
    assert worse
    assert worse_than_exits(policy, logits, labels) == worse
    assert len(worse_than_exits(fit_ensemble(policy, logits, labels), logits, labels)) < len(worse)


def test_separable_answers_have_finite_weights():
    labels = torch.tensor([0, 1, 2] * 5)
    logits = 20 * torch.nn.functional.one_hot(labels, 3).float().expand(2, -1, -1)
    assert all(values.isfinite().all() for values in fit_geometric_ensemble(logits, labels))


def test_what_cannot_be_fitted_is_refused():
    logits, labels = stored()
    policy = build_policy("ensemble", exits=4)
    with pytest.raises(ValueError, match="test"):
        fit_ensemble(policy, logits, labels, split="test")
    with pytest.raises(ValueError, match="ridge must be above 0, got 0"):
        fit_geometric_ensemble(logits, labels, ridge=0)
    broken = logits.masked_fill(logits > 5, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_geometric_ensemble(broken, labels)
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_ensemble(policy, broken, labels)
