"""Differential privacy of one released representation: scales of noise, and the most that can be read through it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def laplace_scale(epsilon: float, sensitivity: float) -> float:
    r"""Return b of the Laplace noise, of density exp(−|x|/b) / 2b per element, that is ε-differentially private.

    b = Δ₁/ε, theorem 3.6 of Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014.

    Args:
        epsilon: ε > 0.
        sensitivity: Δ₁ > 0, the largest L1 distance of two representations; 2C where their L1 norms are at most C.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> laplace_scale(epsilon=2, sensitivity=1)
        0.5
    """
    _check_epsilon(epsilon)
    _check_sensitivity(sensitivity)
    return sensitivity / epsilon


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float, *, classic: bool = False) -> float:
    r"""Return σ of the Gaussian noise that is (ε, δ)-differentially private.

    The analytic one is the smallest σ of all, of any ε: the root of

    .. math:: \Phi\left(\frac{\Delta}{2\sigma} - \frac{\epsilon\sigma}{\Delta}\right)
              - e^\epsilon \Phi\left(-\frac{\Delta}{2\sigma} - \frac{\epsilon\sigma}{\Delta}\right) = \delta

    theorem 8 of Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", 2018. The classic one is
    σ = Δ·√(2 ln(1.25/δ))/ε, theorem A.1 of Dwork and Roth, which is proven for ε < 1 only and too small far above it.

    Args:
        epsilon: ε > 0.
        delta: 0 < δ < 1.
        sensitivity: Δ > 0, the largest L2 distance of two representations; 2C where their L2 norms are at most C.
        classic: Whether to take the classic formula.

    Raises:
        ValueError: An argument is out of its range, or the classic formula is asked for at ε ≥ 1.

    Example:
        >>> round(gaussian_sigma(epsilon=10, delta=1e-5, sensitivity=1), 3)
        0.5
    """
    _check_epsilon(epsilon)
    _check_sensitivity(sensitivity)
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, got {delta}; 1e-5 is usual")
    if classic:
        if epsilon >= 1:
            raise ValueError(
                f"the classic formula holds for epsilon below 1, got {epsilon}; leave classic out, which takes the "
                "analytic one"
            )
        return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    return sensitivity * _root(lambda ratio: gaussian_delta(epsilon, ratio), delta)


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Return the least δ at which Gaussian noise of ``sigma`` times the sensitivity is (ε, δ)-differentially private.

    The left side of the equation of :func:`gaussian_sigma`, with Δ = 1.

    Example:
        >>> gaussian_delta(epsilon=1, sigma=100) < 1e-9
        True
    """
    half, cost = 0.5 / sigma, epsilon * sigma
    # By logarithms, as e^ε alone overflows from ε = 710 on.
    tails = torch.tensor([half - cost, -half - cost], dtype=torch.float64)
    first, second = torch.special.log_ndtr(tails).tolist()
    return math.exp(first) * -math.expm1(min(epsilon + second - first, 0.0))


def laplace_accuracy(epsilon: float, classes: int) -> float:
    """Return the highest accuracy that any classifier can have behind an ε-private release, with even classes.

    e^ε/(e^ε + K − 1), which randomised response reaches: of each class the release is at most e^ε times as likely as of
    any other.

    Args:
        epsilon: ε > 0.
        classes: K ≥ 2.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> round(laplace_accuracy(epsilon=1, classes=10), 2)
        0.23
    """
    _check_epsilon(epsilon)
    _check_classes(classes)
    return 1 / (1 + (classes - 1) * math.exp(-epsilon))


def gaussian_accuracy(epsilon: float, delta: float, classes: int) -> float:
    r"""Return the accuracy of ideal codewords, one a class, behind the analytic Gaussian noise of norms clipped to C.

    K codewords of norm C that are as far from one another as can be, a simplex, are told apart with probability

    .. math:: \int \varphi(t)\, \Phi\left(t + \frac{C}{\sigma} \sqrt{\frac{K}{K-1}}\right)^{K-1} dt

    as for simplex signals in white noise; K − 1 dimensions are enough. No network is better on even classes, as far as
    simplex signals are the best ones, which is Shannon's conjecture at any noise and proven for much and little.

    Args:
        epsilon: ε > 0.
        delta: 0 < δ < 1.
        classes: K ≥ 2.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> round(gaussian_accuracy(epsilon=10, delta=1e-5, classes=10), 2)
        0.36
    """
    _check_classes(classes)
    apart = math.sqrt(classes / (classes - 1)) / gaussian_sigma(epsilon, delta, 2.0)
    t = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    right = (classes - 1) * torch.special.log_ndtr(t + apart)
    return float(torch.trapezoid((right - t**2 / 2).exp(), t) / math.sqrt(2 * math.pi))


def _root(falling: Callable[[float], float], value: float) -> float:
    """Return where a positive, falling function takes a value, to the last digits."""
    low, high = 1e-6, 1.0
    while falling(low) < value:
        low /= 1e3
    while falling(high) > value:
        high *= 2
    for _ in range(200):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        low, high = (middle, high) if falling(middle) > value else (low, middle)
    return high


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a positive finite number, got {epsilon}; a smaller one hides more")


def _check_sensitivity(sensitivity: float) -> None:
    if not 0 < sensitivity < math.inf:
        raise ValueError(f"sensitivity must be a positive finite number, got {sensitivity}; it is 2C for clipped norms")


def _check_classes(classes: int) -> None:
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
