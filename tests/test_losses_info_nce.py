"""InfoNCE against a loop, and against information that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cleave.losses import InfoNCELoss, information_below


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [2, 3, 17])
def test_it_is_the_loop_in_float64(count):
    scores = 3 * drawn(count, count)
    table = np.asarray(scores)
    total = 0.0
    for i in range(count):
        total -= math.log(math.exp(table[i, i]) / sum(math.exp(table[i, j]) for j in range(count)))
    assert InfoNCELoss()(scores).item() == pytest.approx(total / count, abs=1e-12)
    assert InfoNCELoss()(scores.float()).item() == pytest.approx(total / count, abs=1e-5)
    assert information_below(scores).item() == pytest.approx((math.log(count) - total / count) / math.log(2), abs=1e-12)


def test_rows_are_representations_and_columns_images():
    scores = torch.zeros(3, 3)
    scores[0, 1:] = 5.0  # the first representation takes the other images for its own
    expected = (math.log(1 + 2 * math.exp(5)) + 2 * math.log(3)) / 3
    assert InfoNCELoss()(scores).item() == pytest.approx(expected)
    assert InfoNCELoss()(scores.T).item() != pytest.approx(expected)


def test_gradients_are_right():
    assert torch.autograd.gradcheck(InfoNCELoss(), drawn(5, 5).requires_grad_())


@pytest.mark.parametrize("scale", [0, 1, 1e4])
def test_the_ceiling_is_never_passed(scale):
    for count in (2, 8, 64):
        scores = scale * (drawn(count, count, seed=count) + 3 * torch.eye(count))
        assert information_below(scores).item() <= math.log2(count)
    assert information_below(1e4 * torch.eye(64)).item() == pytest.approx(6)
    assert information_below(torch.zeros(64, 64)).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_is_summed_in_float32():
    scores = torch.zeros(4096, 4096, dtype=torch.float16)
    found = InfoNCELoss()(scores)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.log(4096), rel=1e-6)


@pytest.mark.parametrize(("correlation", "near"), [(0.3, 0.02), (0.6, 0.05), (0.9, 0.3), (0.999, None)])
def test_with_the_true_density_ratio_it_stays_below_the_information_of_gaussians_and_is_near_where_that_is_low(
    correlation, near
):
    """I = −½·log₂(1 − ρ²); the best critic is the logarithm of the density ratio (their eq. 2)."""
    true, batch, found = -0.5 * math.log2(1 - correlation**2), 128, []
    for seed in range(40):
        x, noise = drawn(2, batch, seed=seed)
        z = correlation * x + math.sqrt(1 - correlation**2) * noise
        # log p(z | x) − log p(z); what hangs on z alone cancels.
        scores = -((z[:, None] - correlation * x[None]) ** 2) / (2 * (1 - correlation**2))
        found.append(information_below(scores))
    mean, error = torch.stack(found).mean().item(), (torch.stack(found).std() / 40**0.5).item()
    assert mean <= true + 3 * error
    assert mean <= math.log2(batch)
    if near is not None:
        assert mean >= true - near - 3 * error


@pytest.mark.parametrize("shape", [(4,), (1, 1), (0, 0), (3, 4), (2, 2, 2)])
def test_scores_of_no_square_are_refused(shape):
    with pytest.raises(ValueError, match=r"scores must be \(N, N\) of N >= 2"):
        InfoNCELoss()(torch.zeros(shape))
