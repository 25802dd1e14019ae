from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from cleave.architectures.noise.guarantee import (
    gaussian_accuracy,
    gaussian_delta,
    gaussian_sigma,
    laplace_accuracy,
    laplace_scale,
)


@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.01, 0.5])
@pytest.mark.parametrize("epsilon", [1e-3, 0.3, 1.0, 10.0, 50.0, 1000.0])
def test_the_analytic_sigma_solves_its_equation(epsilon, delta):
    sigma = gaussian_sigma(epsilon, delta, 1.0)
    first = stats.norm.cdf(0.5 / sigma - epsilon * sigma)
    second = np.exp(epsilon + stats.norm.logcdf(-0.5 / sigma - epsilon * sigma))
    assert first - second == pytest.approx(delta, rel=1e-9, abs=1e-15)
    assert gaussian_sigma(epsilon, delta, 3.0) == pytest.approx(3 * sigma)
    assert gaussian_delta(epsilon, 0.999 * sigma) > delta


@pytest.mark.parametrize(("epsilon", "sigma"), [(0.5, 2.0), (10.0, 0.5)])
def test_the_loss_of_privacy_is_what_an_integral_says(epsilon, sigma):
    """δ = ∫ max(0, p − e^ε·q), by quadrature."""
    p, q = stats.norm(0, sigma), stats.norm(1, sigma)
    crossing = optimize.brentq(lambda x: p.logpdf(x) - q.logpdf(x) - epsilon, -20, 20)
    expected, _ = integrate.quad(lambda x: p.pdf(x) - math.exp(epsilon) * q.pdf(x), -20, crossing)
    assert gaussian_delta(epsilon, sigma) == pytest.approx(expected, rel=1e-6)


def test_the_classic_formula_is_for_small_epsilons():
    assert gaussian_sigma(0.5, 1e-5, 2.0, classic=True) == pytest.approx(2 * math.sqrt(2 * math.log(125000)) / 0.5)
    assert gaussian_sigma(0.5, 1e-5, 2.0) < gaussian_sigma(0.5, 1e-5, 2.0, classic=True)
    assert gaussian_sigma(10, 1e-5, 1.0) == pytest.approx(0.500, abs=5e-4)
    for epsilon in (1, 1.0, 10):
        with pytest.raises(ValueError, match=f"epsilon below 1, got {epsilon}"):
            gaussian_sigma(epsilon, 1e-5, 1.0, classic=True)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_the_worst_likelihood_ratio_of_laplace_is_epsilon(epsilon):
    bound = 1.0
    scale = laplace_scale(epsilon, 2 * bound)
    release = np.linspace(-10, 10, 401)
    # Two representations at opposite ends, in one dimension and spread over two.
    ratios = stats.laplace.logpdf(release, -bound, scale) - stats.laplace.logpdf(release, bound, scale)
    assert ratios.max() == pytest.approx(epsilon)
    x, y = np.meshgrid(release, release)
    log = sum(
        stats.laplace.logpdf(axis, -bound / 2, scale) - stats.laplace.logpdf(axis, bound / 2, scale) for axis in (x, y)
    )
    assert log.max() <= epsilon + 1e-12


def test_accuracies_that_are_possible():
    assert laplace_accuracy(1, 10) == pytest.approx(0.232, abs=1e-3)
    assert laplace_accuracy(3, 10) == pytest.approx(0.69, abs=1e-3)
    assert laplace_accuracy(2000, 10) == 1
    for epsilon, expected in ((10, 0.36), (20, 0.62), (50, 0.96)):
        assert gaussian_accuracy(epsilon, 1e-5, 10) == pytest.approx(expected, abs=0.005)


def test_the_accuracy_of_codewords_is_that_of_a_draw():
    classes, epsilon = 4, 8.0
    sigma = gaussian_sigma(epsilon, 1e-5, 2.0)
    simplex = np.eye(classes) - 1 / classes
    simplex /= np.linalg.norm(simplex[0])
    noise = np.random.default_rng(0).normal(scale=sigma, size=(200_000, classes))
    right = ((simplex[0] + noise) @ simplex.T).argmax(1) == 0
    spread = right.std() / math.sqrt(len(right))
    assert gaussian_accuracy(epsilon, 1e-5, classes) == pytest.approx(right.mean(), abs=4 * spread)


@pytest.mark.parametrize("bad", [0, -1, math.inf, math.nan])
def test_bad_numbers_are_refused_by_name(bad):
    for call in (lambda: laplace_scale(bad, 1), lambda: gaussian_sigma(bad, 1e-5, 1), lambda: laplace_accuracy(bad, 2)):
        with pytest.raises(ValueError, match=f"epsilon must be a positive finite number, got {bad}"):
            call()
    for call in (lambda: laplace_scale(1, bad), lambda: gaussian_sigma(1, 1e-5, bad)):
        with pytest.raises(ValueError, match=f"sensitivity must be a positive finite number, got {bad}"):
            call()
    if bad != math.inf:
        with pytest.raises(ValueError, match=f"delta must lie between 0 and 1, got {bad}"):
            gaussian_sigma(1, bad, 1)
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        gaussian_accuracy(1, 1e-5, 1)
