"""Bounds on what a payload says of its image, in bits, and the distance correlation of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cleave.reports.attacks.metrics import Interval, resampled_means
from cleave.reports.terminal import number, say, table

ABOVE, BELOW = "at most", "at least"


@dataclasses.dataclass(frozen=True)
class Bound:
    """A bound on the information between an image and what is sent of it.

    Attributes:
        key: A word for it, as loggers keep it.
        name: What it rests on.
        side: ``at most`` or ``at least``.
        bits: The bound, with its 95 % bootstrap interval over images, or over batches.
        holds_of: What it says something of, where that is not what is sent.
        ceiling: The most that such a bound can say, in bits; ``None``: there is none.
    """

    key: str
    name: str
    side: str
    bits: Interval
    holds_of: str | None = None
    ceiling: float | None = None


@dataclasses.dataclass(frozen=True)
class Information:
    """What is known of the information between images and payloads.

    Attributes:
        bounds: Bounds on it.
        distance_correlation: Bias-corrected, as ``value``, its ``spread`` over batches (standard deviation), the number
            of ``batches`` and the images of a ``batch``; ``None`` where there are fewer than 4 images. No bound.
    """

    bounds: tuple[Bound, ...] = ()
    distance_correlation: dict[str, Any] | None = None

    def as_values(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**dataclasses.asdict(self), "bounds": [dataclasses.asdict(each) for each in self.bounds]}


def payload_bits(lengths: Sequence[int]) -> Tensor:
    r"""Return the bits of payloads, whose mean the information cannot exceed, (N,), float64.

    A payload of fixed length is a message of 8 bits a byte. Where lengths differ, the length speaks as well: of all
    whole numbers of a mean μ it says at most log₂(e(μ + 1)) bits (the geometric distribution has the highest entropy;
    Cover and Thomas, "Elements of Information Theory", 2006, chapter 12), which are added.

    Args:
        lengths: Bytes of each payload, its envelope left out.

    Example:
        >>> payload_bits([32, 32]).tolist()
        [256.0, 256.0]
    """
    found = torch.tensor(lengths, dtype=torch.float64)
    more = 0.0 if len(set(lengths)) < 2 else math.log2(math.e * (found.mean().item() + 1))
    return 8 * found + more


def bound_of(key: str, name: str, side: str, values: Tensor, resamples: int, seed: int, **more: Any) -> Bound:
    """Return a bound that is the mean of values of images or batches, in bits."""
    values = values.double().cpu()
    drawn = resampled_means(values[None], resamples, seed)[0]
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Bound(key, name, side, Interval(values.mean().item(), low, high), **more)


def print_information(information: Information) -> None:
    """Print the bounds, and the distance correlation, which is none."""
    rows = []
    for each in information.bounds:
        name = each.name if each.holds_of is None else f"{each.name} ({each.holds_of})"
        interval = f"[{number(each.bits.low)}, {number(each.bits.high)}]"
        rows.append(
            (name, each.side, number(each.bits.value), interval, "" if each.ceiling is None else number(each.ceiling))
        )
    header = ("bound on I(image; payload)", "side", "bits", "95 % interval", "ceiling")
    table("Bounds on information, of one release", rows, header)
    found = information.distance_correlation
    if found is not None:
        say(
            f"Distance correlation of images and payloads, bias-corrected: {found['value']:.3f}, spread "
            f"{found['spread']:.3f} over {found['batches']} batches of {found['batch']}; a statistic, no bound"
        )
