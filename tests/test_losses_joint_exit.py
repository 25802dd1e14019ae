import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from cleave.losses import JointExitLoss

EXITS = ["layer1", "layer2", "final"]
COSTS = [0.2, 0.55, 1.0]
LEARNED = [0.4, -0.7, 0.1]
# What each setting of the weights makes of three exits at a progress of 0.25.
LAMBDAS = {
    "equal": [1, 1, 1],
    "branchynet": [1, 1, 0.3],
    "linear": [1 / 6, 1 / 3, 1 / 2],
    "shallow_deep": [0.01 + (0.2 - 0.01) / 4, 0.01 + (0.55 - 0.01) / 4, 1],
    "learned": [math.exp(-s) for s in LEARNED],
    (0.3, 0, 2): [0.3, 0, 2],
}


def batch(exits=3, b=6, k=5, dtype=torch.float64):
    logits = 3 * torch.randn(exits, b, k, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return list(logits), torch.arange(b) % k


def bound(weights, **settings):
    loss = JointExitLoss(weights, **settings)
    loss.bind(EXITS, COSTS)
    if weights == "learned":
        loss.double().log_scales.data.copy_(torch.tensor(LEARNED, dtype=torch.float64))
    return loss


def total(terms):
    return torch.stack(list(terms.values())).sum()


def cross_entropies(logits, labels, smoothing=0.0):
    """Each exit's cross entropy with smoothed one-hot targets in float64."""
    values = []
    for output in logits:
        log_q = log_softmax(output.detach().double().numpy(), axis=1)
        k = log_q.shape[1]
        target = (1 - smoothing) * np.eye(k)[labels.numpy()] + smoothing / k
        values.append(-(target * log_q).sum(1).mean())
    return np.array(values)


@pytest.mark.parametrize("weights", LAMBDAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_float64_reference_term_by_term(weights, smoothing):
    logits, labels = batch()
    expected = np.array(LAMBDAS[weights]) * cross_entropies(logits, labels, smoothing)
    if weights == "learned":
        expected += LEARNED
    loss = bound(weights, label_smoothing=smoothing)
    terms = loss(logits, labels, 0.25)
    assert list(terms) == EXITS
    assert [term.item() for term in terms.values()] == pytest.approx(expected, rel=1e-10)
    assert total(terms).item() == pytest.approx(expected.sum(), rel=1e-10)
    assert total(loss(torch.stack(logits).float(), labels, 0.25)).item() == pytest.approx(expected.sum(), rel=1e-6)


@pytest.mark.parametrize("weights", LAMBDAS)
def test_the_gradient_is_the_weighted_sum_of_the_gradients_of_single_exits(weights):
    torch.manual_seed(0)
    trunk, heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
    network = nn.ModuleList([trunk, heads]).double()
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 5

    def exits():
        features, outputs = x, []
        for layer, head in zip(trunk, heads, strict=True):
            features = layer(features).tanh()
            outputs.append(head(features))
        return outputs

    def gradient(value):
        network.zero_grad(set_to_none=True)
        value.backward()
        return torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in network.parameters()]
        )

    single = [gradient(nn.functional.cross_entropy(exits()[j], labels)) for j in range(3)]
    expected = sum(weight * g for weight, g in zip(LAMBDAS[weights], single, strict=True))
    assert len({tuple(g.tolist()) for g in single}) == 3
    torch.testing.assert_close(gradient(total(bound(weights)(exits(), labels, 0.25))), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", ["branchynet", "learned", (0.3, 0, 2)])
def test_gradient_is_exact(weights):
    logits, labels = batch(b=2)
    loss = bound(weights, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda *s: total(loss(s, labels)), [s.requires_grad_() for s in logits])


def test_the_gradient_of_learned_weights_has_its_closed_form():
    logits, labels = batch()
    loss = bound("learned")
    total(loss(logits, labels)).backward()
    expected = 1 - np.exp(-np.array(LEARNED)) * cross_entropies(logits, labels)
    assert loss.log_scales.grad.tolist() == pytest.approx(expected, rel=1e-10)


def test_learned_weights_settle_at_the_inverse_of_each_loss():
    logits, labels = batch()
    loss = bound("learned")
    loss.log_scales.data.copy_(torch.tensor(np.log(cross_entropies(logits, labels))))
    total(loss(logits, labels)).backward()
    assert loss.log_scales.grad.abs().max() < 1e-12


def test_an_exit_of_weight_zero_lets_no_nan_in_and_learns_nothing():
    logits, labels = batch()
    logits = [output.requires_grad_() for output in logits]
    with torch.no_grad():
        logits[1].fill_(math.nan)
    loss = JointExitLoss([1, 0, 1])
    assert [term.item() > 0 for term in loss(logits, labels).values()] == [True, False, True]
    total(loss(logits, labels)).backward()
    assert logits[1].grad is None
    assert logits[0].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("weights", ["learned", "linear", (1, 0, 1)])
def test_half_precision_is_computed_in_single(dtype, weights):
    logits, labels = batch()
    logits = [(100 * output).to(dtype) for output in logits]
    loss = JointExitLoss(weights)
    loss.bind(EXITS)
    expected = loss.weights_at(3, 1).numpy() @ cross_entropies(logits, labels)
    terms = loss(logits, labels)
    measured = total(terms)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert measured.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [-0.1, 1, math.nan])
def test_a_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=rf"label_smoothing must lie in \[0, 1\), got {smoothing}"):
        JointExitLoss(label_smoothing=smoothing)
