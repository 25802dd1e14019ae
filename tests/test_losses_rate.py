import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from cleave.losses import RateLoss


def likelihoods(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.98 + 0.01


def test_equals_the_float64_reference():
    p = likelihoods(5, 3, 4, 4)
    expected = -np.log2(p.numpy()).sum() / (5 * 32 * 32)
    assert RateLoss(32 * 32)(p).item() == pytest.approx(expected, rel=1e-12)
    assert RateLoss(32 * 32)(p.float()).item() == pytest.approx(expected, rel=1e-6)


def test_is_the_entropy_where_symbols_follow_their_prior():
    prior = np.array([0.5, 0.25, 0.125, 0.125])
    symbols = np.repeat(np.arange(4), (prior * 64).astype(int))
    rate = RateLoss(pixels=64)(torch.tensor(prior[symbols])[None])
    assert rate.item() == pytest.approx(entropy(prior, base=2), rel=1e-12)


def test_counts_pixels_of_the_image_and_not_elements_of_the_representation():
    p = torch.full((4, 8, 2, 2), 0.5)
    assert RateLoss(pixels=64)(p) == 0.5
    assert RateLoss(pixels=64)(p.repeat(3, 1, 1, 1)) == 0.5
    assert RateLoss(pixels=64)(p.repeat(1, 2, 1, 1)) == 1


def test_gradient_is_exact():
    assert torch.autograd.gradcheck(RateLoss(16), likelihoods(2, 3, 2, 2).requires_grad_())


def test_an_impossible_element_costs_thirty_bits_and_is_still_drawn_back():
    p = torch.tensor([[0.0, 1e-12, 1e-9, 1.0]], requires_grad=True)
    rate = RateLoss(pixels=1)(p)
    assert rate.item() == pytest.approx(3 * -math.log2(1e-9), rel=1e-6)
    rate.backward()
    slope = -1e9 / math.log(2)
    torch.testing.assert_close(p.grad, torch.tensor([[slope, slope, slope, -1 / math.log(2)]]))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    p = likelihoods(2, 64, 64, 64).to(dtype)
    p[0, 0, 0, 0] = 0
    expected = -p.double().clamp_min(1e-9).log2().sum().item() / 2
    assert expected > torch.finfo(torch.half).max
    rate = RateLoss(pixels=1)(p)
    assert rate.dtype == torch.float32
    assert rate.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pixels", [0, -4, 32.0, True, None])
def test_pixels_that_are_no_whole_number_are_refused(pixels):
    with pytest.raises(ValueError, match=f"pixels must be a whole number of at least 1.*got {pixels}"):
        RateLoss(pixels)
