import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from torch.distributions import Normal, kl_divergence

from cleave.losses import InformationBottleneckLoss
from cleave.losses.information_bottleneck import PRIORS


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 2, 4, 4, generator=generator, dtype=dtype)
    return mean, 2 * torch.randn(3, 2, 4, 4, generator=generator, dtype=dtype) - 2


def log_uniform(mean, log_variance):
    """The fit of Molchanov et al. (eq. 14) as printed, in float64."""
    alpha = np.exp(log_variance) / np.square(mean)
    minus = 0.63576 * expit(1.87320 + 1.48695 * np.log(alpha)) - 0.5 * np.log1p(1 / alpha) - 0.63576
    return -minus


def exact_log_uniform(signal):
    """KL of N(signal, 1) from the log-uniform prior by quadrature, 0 where there is no signal.

    The divergence is E log|signal + ε| up to a constant, and E log|ε| = -(γ + log 2) / 2.
    """
    bounds = sorted({-12.0, 12.0, min(12.0, max(-12.0, -signal))})

    def integrand(noise):
        return math.log(abs(signal + noise)) * math.exp(-noise * noise / 2) / math.sqrt(2 * math.pi)

    pieces = [quad(integrand, *ends, limit=200)[0] for ends in itertools.pairwise(bounds)]
    return sum(pieces) + (np.euler_gamma + math.log(2)) / 2


def test_standard_normal_equals_the_closed_form():
    mean, log_variance = batch()
    m, v = mean.numpy(), log_variance.numpy()
    expected = 0.5 * (m**2 + np.exp(v) - 1 - v).sum() / 3
    loss = InformationBottleneckLoss("standard_normal")
    assert loss(mean, log_variance).item() == pytest.approx(expected, rel=1e-12)
    assert loss(mean.float(), log_variance.float()).item() == pytest.approx(expected, rel=1e-6)
    peer = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum() / 3
    torch.testing.assert_close(loss(mean, log_variance), peer)


def test_log_uniform_equals_the_printed_fit():
    mean, log_variance = batch()
    expected = log_uniform(mean.numpy(), log_variance.numpy()).sum() / 3
    loss = InformationBottleneckLoss("log_uniform")
    assert loss(mean, log_variance).item() == pytest.approx(expected, rel=1e-12)
    assert loss(mean.float(), log_variance.float()).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("log_alpha", np.linspace(-12, 12, 49))
def test_the_log_uniform_fit_holds_against_quadrature(log_alpha):
    measured = InformationBottleneckLoss("log_uniform")(
        torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), log_alpha, dtype=torch.float64)
    )
    assert measured.item() == pytest.approx(exact_log_uniform(math.exp(-log_alpha / 2)), abs=0.01)


def test_log_uniform_depends_on_the_ratio_of_noise_and_signal_alone():
    mean, log_variance = batch()
    loss = InformationBottleneckLoss("log_uniform")
    torch.testing.assert_close(loss(7 * mean, log_variance + 2 * math.log(7)), loss(mean, log_variance))
    torch.testing.assert_close(loss(-mean, log_variance), loss(mean, log_variance))


@pytest.mark.parametrize("prior", PRIORS)
def test_gradient_is_exact(prior):
    mean, log_variance = batch()
    mean[0, 0, 0, :3] = torch.tensor([0.0, 1e-4, -1e-3])
    log_variance[0, 0, 0, :2] = 0
    inputs = mean.requires_grad_(), log_variance.requires_grad_()
    assert torch.autograd.gradcheck(InformationBottleneckLoss(prior), inputs)


@pytest.mark.parametrize("prior", PRIORS)
def test_nothing_is_free_but_the_prior_itself(prior):
    loss = InformationBottleneckLoss(prior)
    assert loss(torch.zeros(2, 3), torch.zeros(2, 3)) < 1e-30
    assert loss(*batch()) > 0


@pytest.mark.parametrize("mean", [0.0, 1e-30, -1e-20, 1e-8, 1e4])
@pytest.mark.parametrize("log_variance", [-20.0, -5.0, 0.0, 10.0])
@pytest.mark.parametrize("prior", PRIORS)
def test_extremes_stay_finite_in_single_precision(prior, mean, log_variance):
    m = torch.full((1, 2), mean, requires_grad=True)
    v = torch.full((1, 2), log_variance, requires_grad=True)
    loss = InformationBottleneckLoss(prior)(m, v)
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert m.grad.isfinite().all()
    assert v.grad.isfinite().all()
    if prior == "log_uniform" and abs(mean) <= 1e-8:
        assert loss < 1e-6


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_summed_in_single(prior, dtype):
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 2, 64, 64, 64, generator=generator).to(dtype)
    loss = InformationBottleneckLoss(prior)
    expected = loss(mean.double(), log_variance.double())
    assert expected > torch.finfo(torch.half).max
    measured = loss(mean, log_variance)
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured.double(), expected, rtol=1e-5, atol=0)


def test_an_unknown_prior_is_refused():
    with pytest.raises(ValueError, match="standard_normal, log_uniform, got 'laplace'"):
        InformationBottleneckLoss("laplace")


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"mean \(2, 3\) and log_variance \(2, 1\) differ"):
        InformationBottleneckLoss()(torch.zeros(2, 3), torch.zeros(2, 1))
