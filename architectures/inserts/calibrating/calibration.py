"""Ranges for a quantiser that was not there in training: post-training calibration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cleave.architectures.inserts.finite import DEAD, DIVERGED, NumberError, check_finite
from cleave.architectures.naming import whole_number
from cleave.deployment import check_bits
from cleave.deployment.codecs.uniform import usable_range

METHODS = ("mse", "minmax", "percentile")
_Values = npt.NDArray[np.float64]
_COARSE = np.geomspace(1, 2**-10, 41)
_FINE = np.geomspace(2**0.25, 2**-0.25, 9)  # from one coarse neighbour to the other
_WHOLE = np.ones(1)


@torch.no_grad()
def calibrate_range(
    values: Iterable[Tensor],
    bits: int,
    method: str = "mse",
    percentile: float | None = None,
    samples: int = 2**16,
) -> tuple[float, float]:
    r"""Measure the range that a uniform quantiser should have for a representation it was not trained with.

    Few levels are spent better on the bulk of the values than on their extremes. ``mse`` finds the clipping that
    minimises the quantisation error

    .. math:: (l, h) = \arg\min_{l, h} \; \mathrm{E} \, (z - Q_{l, h}(z))^2,

    with Q as in ``UniformQuantizer`` (Banner et al., "Post Training 4-bit Quantization of
    Convolutional Networks for Rapid-Deployment", 2019, who solve it for an assumed distribution; Nagel et al., "A White
    Paper on Neural Network Quantization", 2021, who search, as is done here). Both ends move independently between the
    median and the extreme on a geometric grid, so that an outlier a thousand times as large as the bulk is given up as
    readily as a small one; a second, finer grid refines the best pair.

    Args:
        values: Representations, of any shape; they pass by once, and memory stays bounded.
        bits: Width of a code, 2 to 16.
        method: ``mse``; ``minmax``: all that was seen; ``percentile``: what lies between ``100 - percentile`` and
            ``percentile`` per cent.
        percentile: Above 50 and at most 100; ``None`` takes 99.9. Only for ``percentile``.
        samples: Values to keep, drawn evenly from all with a fixed seed; the extremes are exact in any case.

    Returns:
        low and high, which float32 represents exactly.

    Raises:
        NumberError: A value is not finite, or all are the same.
        ValueError: An argument is out of range, or there are no values.

    Example:
        >>> z = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
        >>> [round(end, 1) for end in calibrate_range([z], bits=2)]
        [-1.5, 1.5]
        >>> [round(end, 1) for end in calibrate_range([z], bits=2, method="minmax")]
        [-4.3, 4.6]
    """
    _check(bits, method, percentile, samples)
    kept, low, high = _collect(values, samples)
    if method == "percentile":
        percent = 99.9 if percentile is None else percentile
        low, high = np.percentile(kept, [100 - percent, percent])
        if not np.float32(low) < np.float32(high):
            raise ValueError(
                f"percentile={percent} leaves the single value {low:g} of the representation; raise it or use mse"
            )
    elif method == "mse":
        low, high = _least_error(kept, low, high, 2**bits)
    return float(np.float32(low)), float(np.float32(high))


def _check(bits: int, method: str, percentile: float | None, samples: int) -> None:
    if check_bits(bits) == 32:
        raise ValueError("bits=32 means float, which has no range to calibrate; choose 2 to 16")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if percentile is not None and method != "percentile":
        raise ValueError(f"percentile={percentile} has no meaning for method={method!r}; leave it out")
    if percentile is not None and not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
    whole_number("samples", samples, 2)


def _collect(values: Iterable[Tensor], samples: int) -> tuple[_Values, float, float]:
    """Return an even draw of at most ``samples`` of the values as float64, and the extremes of all of them."""
    generator = np.random.default_rng(0)
    kept, keys = np.empty(0), np.empty(0)
    low, high = math.inf, -math.inf
    for tensor in values:
        check_finite(tensor, "the representation")
        new = tensor.detach().flatten().float().cpu().numpy().astype(np.float64)
        if not len(new):
            continue
        low, high = min(low, float(new.min())), max(high, float(new.max()))
        # The values with the smallest of random keys are a draw without replacement, however many there will be.
        kept, keys = np.concatenate([kept, new]), np.concatenate([keys, generator.random(len(new))])
        if len(kept) > samples:
            chosen = np.argpartition(keys, samples)[:samples]
            kept, keys = kept[chosen], keys[chosen]
    if not len(kept):
        raise ValueError("calibration needs at least one batch, got none; give more batches or check the data")
    if low == high:
        raise NumberError(f"the representation is {low:g} everywhere: {DEAD}")
    if not usable_range(low, high):
        raise NumberError(f"the representation reaches from {low:g} to {high:g}: {DIVERGED}")
    return kept, low, high


def _least_error(values: _Values, low: float, high: float, levels: int) -> tuple[float, float]:
    """Return the ends of least squared error: on a coarse grid of clippings, then on a finer one around the best."""
    median = float(np.median(values))
    below, above = median - low, high - median

    def search(downward: _Values, upward: _Values) -> tuple[float, float]:
        """Return the best pair of shares that the two sides keep of their length; a side of no length has no choice."""
        pairs = itertools.product(downward if below else _WHOLE, upward if above else _WHOLE)
        return min(pairs, key=lambda kept: _error(values, median - kept[0] * below, median + kept[1] * above, levels))

    best = search(_COARSE, _COARSE)
    best = search(*(np.minimum(share * _FINE, 1) for share in best))
    return median - best[0] * below, median + best[1] * above


def _error(values: _Values, low: float, high: float, levels: int) -> float:
    """Mean squared error of the uniform quantiser; infinite where float32 cannot tell its ends apart."""
    if np.float32(low) >= np.float32(high):
        return math.inf
    step = (high - low) / (levels - 1)
    codes = ((values - low) / step).round().clip(0, levels - 1)
    return float(np.square(low + codes * step - values).mean())
