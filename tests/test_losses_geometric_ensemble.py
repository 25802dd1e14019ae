import numpy as np
import pytest
import torch
from scipy.special import softmax

from cleave.losses import GeometricEnsembleLoss, geometric_ensemble


def ensemble(exits=3, b=4, k=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(exits, b, k, generator=generator, dtype=dtype)
    weights = torch.rand(exits, exits, generator=generator, dtype=dtype) + 0.1
    log_bias = torch.randn(exits, k, generator=generator, dtype=dtype)
    return logits, weights.tril(), log_bias, torch.arange(b) % k


def total(terms):
    return torch.stack(list(terms.values())).sum()


def reference(logits, weights, log_bias):
    """The product of probabilities as it is printed, in float64."""
    p, w, b = softmax(logits.double().numpy(), axis=2), weights.double().numpy(), np.exp(log_bias.double().numpy())
    q = np.empty_like(p)
    for m in range(len(p)):
        q[m] = b[m]
        for i in range(m + 1):
            q[m] *= p[i] ** w[m, i]
        q[m] /= q[m].sum(1, keepdims=True)
    return q


def test_equals_the_float64_product_of_probabilities():
    logits, weights, log_bias, _ = ensemble()
    expected = reference(logits, weights, log_bias)
    log_q = geometric_ensemble(logits, weights, log_bias)
    np.testing.assert_allclose(log_q.exp().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(log_q.exp().sum(2).numpy(), 1, rtol=1e-12)
    assert torch.equal(geometric_ensemble(list(logits), weights, log_bias), log_q)
    single = geometric_ensemble(logits.float(), weights.float(), log_bias.float())
    np.testing.assert_allclose(single.exp().numpy(), expected, rtol=1e-5)


def test_an_exit_knows_nothing_of_the_exits_behind_it():
    logits, weights, log_bias, _ = ensemble()
    before = geometric_ensemble(logits, weights, log_bias)
    changed, full = logits.clone(), weights + torch.full_like(weights, 9).triu(1)
    changed[2] = torch.inf
    after = geometric_ensemble(changed, full, log_bias)
    assert torch.equal(after[:2], before[:2])


def test_the_first_exit_with_weight_one_answers_for_itself():
    logits, _, _, _ = ensemble()
    alone = geometric_ensemble(logits, torch.eye(3, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64))
    torch.testing.assert_close(alone, logits.log_softmax(2))


def test_outputs_far_apart_stay_finite():
    logits = torch.tensor([[[1e4, 0.0]], [[-1e4, 0.0]]], requires_grad=True)
    log_q = geometric_ensemble(logits, torch.ones(2, 2).tril(), torch.zeros(2, 2))
    log_q.sum().backward()
    assert log_q.isfinite().all()
    assert logits.grad.isfinite().all()


def test_the_loss_equals_the_float64_reference_term_by_term():
    logits, weights, log_bias, labels = ensemble()
    q = reference(logits, weights, log_bias)
    expected = -np.log(q[:, np.arange(4), labels.numpy()]).mean(1)
    log_q = geometric_ensemble(logits, weights, log_bias)
    loss = GeometricEnsembleLoss()
    assert [term.item() for term in loss(log_q, labels).values()] == pytest.approx(expected, rel=1e-10)
    assert total(loss(log_q, labels)).item() == pytest.approx(expected.sum(), rel=1e-10)
    assert total(loss(list(log_q + 7), labels)).item() == pytest.approx(expected.sum(), rel=1e-10)


def test_the_loss_goes_by_the_names_of_the_exits():
    logits, weights, log_bias, labels = ensemble()
    loss = GeometricEnsembleLoss()
    loss.bind(["layer1", "layer2", "final"])
    assert list(loss(geometric_ensemble(logits, weights, log_bias), labels)) == ["layer1", "layer2", "final"]
    with pytest.raises(ValueError, match="bound to 3 exits, got 2"):
        loss(logits[:2], labels)


def test_gradient_is_exact():
    logits, weights, log_bias, labels = ensemble(b=2)
    loss = GeometricEnsembleLoss()
    inputs = [x.requires_grad_() for x in (logits, weights, log_bias)]
    assert torch.autograd.gradcheck(lambda *x: total(loss(geometric_ensemble(*x), labels)), inputs)


def test_the_gradient_of_the_biases_has_its_closed_form():
    logits, weights, log_bias, labels = ensemble()
    log_bias.requires_grad_()
    total(GeometricEnsembleLoss()(geometric_ensemble(logits, weights, log_bias), labels)).backward()
    expected = (reference(logits, weights, log_bias.detach()) - np.eye(5)[labels.numpy()]).mean(1)
    np.testing.assert_allclose(log_bias.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_computed_in_single_under_autocast_too(dtype):
    logits, weights, log_bias, labels = ensemble()
    logits = logits.to(dtype)
    expected = reference(logits, weights, log_bias)
    with torch.autocast("cpu", dtype=dtype):
        log_q = geometric_ensemble(logits, weights.float(), log_bias.float())
        loss = total(GeometricEnsembleLoss()(log_q, labels))
    assert log_q.dtype == loss.dtype == torch.float32
    np.testing.assert_allclose(log_q.exp().numpy(), expected, rtol=1e-5)
    assert total(GeometricEnsembleLoss()(log_q.to(dtype), labels)).dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "log_bias"), [((2, 2), (3, 5)), ((3, 2), (3, 5)), ((3, 3), (2, 5)), ((3, 3), (3, 4)), ((3, 3), (5,))]
)
def test_parameters_that_do_not_fit_are_refused(weights, log_bias):
    with pytest.raises(ValueError, match=r"weights.*log_bias.*\(3, 3\) and \(3, 5\) for 3 exits over 5 classes"):
        geometric_ensemble(ensemble()[0], torch.ones(weights), torch.zeros(log_bias))


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one \(B, K\) for each exit"):
        geometric_ensemble([torch.zeros(2, 3), torch.zeros(2, 4)], torch.ones(2, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"one \(B, K\) for each exit"):
        GeometricEnsembleLoss()(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
