"""Temperature scaling: confidences that mean what they say, before thresholds are set on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cleave.planning.stored_logits import check_logits

LEAST, MOST = 0.05, 100.0


@torch.no_grad()
def fit_temperatures(logits: Tensor, labels: Tensor, *, split: str = "val") -> tuple[float, ...]:
    r"""Fit one temperature per exit, which divides its logits, to held-out data.

    .. math:: T = \arg\min_T \; -\frac{1}{B} \sum_b \log \mathrm{softmax}(z_b / T)_{y_b}

    (Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", 2017, sec. 4.2.) In the inverse
    temperature this is convex, and Newton's method, kept within a bracket, solves it in float64.

    The temperature stays within 0.05 and 100, and ends there where the optimum lies outside: at 0.05 where every sample
    is answered rightly, so that more confidence is always better, and at 100 where the logits are worse than a guess.

    Args:
        logits: Every exit's own logits (E, B, C).
        labels: int64 (B,).
        split: Where they are from; ``test`` is refused.

    Returns:
        E temperatures, for ``policy.with_temperatures``.

    Raises:
        ValueError: A shape or value is not what it must be, or the split is the test split.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]] * 4])  # sure by 2, but right in three of four cases: log 3 would do
        >>> [round(t, 4) for t in fit_temperatures(logits, torch.tensor([0, 0, 0, 1]))]
        [1.8205]
        >>> round(2 / math.log(3), 4)
        1.8205
    """
    check_split(split)
    check_logits(logits, labels)
    return tuple(1 / _inverse_temperature(own.double(), labels) for own in logits)


def check_split(split: str) -> None:
    """Refuse to calibrate on the split that results are reported on, or on one of an unknown name.

    Raises:
        ValueError: It is neither ``val`` nor ``train``.
    """
    if split == "test":
        raise ValueError(
            'thresholds are calibrated on validation data, or the test result means nothing; got split="test"'
        )
    if split not in ("val", "train"):
        raise ValueError(f'split says where the logits are from, "val" or "train"; got {split!r}')


def _inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the inverse temperature where the slope is zero, or the end of the bracket that it points to."""
    low, high = 1 / MOST, 1 / LEAST
    if _slope(logits, labels, low)[0] >= 0:
        return low
    if _slope(logits, labels, high)[0] <= 0:
        return high
    inverse = 1.0
    for _ in range(200):
        slope, curvature = _slope(logits, labels, inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.inf
        after = step if low < step < high else math.sqrt(low * high)
        if abs(after - inverse) <= 1e-13 * inverse:
            break
        inverse = after
    return inverse


def _slope(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood by the inverse temperature."""
    p = (logits * inverse).softmax(1)
    mean = (p * logits).sum(1)
    variance = (p * (logits - mean.unsqueeze(1)).square()).sum(1)
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return (mean - own).mean().item(), variance.mean().item()
