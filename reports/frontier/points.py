"""A point of a privacy frontier: one network, what it answers, sends and costs, and what an adversary rebuilt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cleave.reports.attacks.metrics import Interval
from cleave.reports.rates.fronts import pareto_front
from cleave.reports.rates.results import check_accuracy

_INTERVALS = ("mse", "explained", "ssim")
_NUMBERS = ("payload_bytes", "device_macs", "device_params", "distance_correlation", "distance_correlation_spread")
_NULLABLE = ("ssim", "device_macs", "device_params", "distance_correlation", "distance_correlation_spread")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a point stands in the grid.

    Attributes:
        layer: Where the network is split; several in one word.
        bits: Width of a code; ``None`` under a learned prior.
        channels: Of the bottleneck; ``None`` where it has no such number.
        strength: Of the defence; ``None`` where none is varied.
    """

    layer: str
    bits: int | None = None
    channels: int | None = None
    strength: float | None = None

    @property
    def split(self) -> tuple[str, int | None, int | None]:
        """Everything but the strength."""
        return self.layer, self.bits, self.channels

    @property
    def split_words(self) -> str:
        """Everything but the strength, in words."""
        words = [self.layer]
        words += [] if self.bits is None else [f"{self.bits} bits"]
        words += [] if self.channels is None else [f"{self.channels} channels"]
        return ", ".join(words)

    def words(self, strength: str | None = None) -> str:
        """Return everything in words, with what the strength is called."""
        if self.strength is None:
            return self.split_words
        return f"{self.split_words}, {strength or 'strength'} {self.strength:g}"


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """A point that was trained, tested and attacked.

    Attributes:
        place: Where it stands in the grid.
        validation: What points are chosen by, measured on validation images.
        accuracy: On test images, from 0 to 1.
        payload_bytes: Mean bytes of an image's payload, as they are sent.
        device_macs: Multiply-accumulates per image on the device.
        device_params: Parameters there.
        attack: The attacker of the lowest MSE.
        mse: The lowest MSE over attackers, with its interval over images.
        explained: What that attacker explains, 1 − MSE/MSE(mean image).
        ssim: Of its images; ``None`` of images that are too small.
        distance_correlation: Bias-corrected, of images and decoded payloads, mean over batches.
        distance_correlation_spread: Its standard deviation over batches.
        details: What else is kept of it, as JSON values.
    """

    place: Place
    validation: float
    accuracy: float
    payload_bytes: float
    device_macs: int | None
    device_params: int | None
    attack: str
    mse: Interval
    explained: Interval
    ssim: Interval | None
    distance_correlation: float | None = None
    distance_correlation_spread: float | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def as_values(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**dataclasses.asdict(self), "details": dict(self.details)}

    @classmethod
    def from_values(cls, values: Any) -> FrontierPoint:
        """Read what :meth:`as_values` gave.

        Raises:
            ValueError: Something is missing or of another kind.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            raise ValueError(f"it must hold {', '.join(names)}")
        place = values["place"]
        if not isinstance(place, dict) or set(place) != {field.name for field in dataclasses.fields(Place)}:
            raise ValueError("its place must hold layer, bits, channels and strength")
        if not isinstance(values["attack"], str) or not isinstance(values["details"], dict):
            raise ValueError("its attack must be a text and its details an object")
        check_accuracy(values["accuracy"])
        for name in ("validation", *_NUMBERS):
            _check_number(name, values[name])
        return cls(
            **{**values, "place": Place(**place), **{name: _interval(name, values[name]) for name in _INTERVALS}}
        )


def _check_number(name: str, value: Any) -> None:
    if value is None and name in _NULLABLE:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"its {name} must be a number, got {value!r}")


def _interval(name: str, values: Any) -> Interval | None:
    if values is None and name in _NULLABLE:
        return None
    if not isinstance(values, dict) or set(values) != {"value", "low", "high"}:
        raise ValueError(f"its {name} must hold value, low and high")
    for value in values.values():
        _check_number(name, value)
    return Interval(**values)


def on_front(points: Sequence[FrontierPoint]) -> list[bool]:
    """Tell which points no other beats in accuracy and in what is explained."""
    return pareto_front([(point.explained.value, -point.accuracy) for point in points])


def reaching(points: Sequence[FrontierPoint], wanted_mse: float) -> FrontierPoint | None:
    """Return the point that answers best on validation images, of those whose lowest MSE is at least what is wanted."""
    able = [point for point in points if point.mse.value >= wanted_mse]
    return max(able, key=lambda point: (point.validation, point.mse.value), default=None)


def weakest_reaching(
    points: Sequence[FrontierPoint], wanted_mse: float, smaller_hides_more: bool
) -> dict[str, FrontierPoint | None]:
    """Return, for each split in words, the point of the least strength whose lowest MSE is at least what is wanted.

    The smallest λ or the largest ε of the survey's grid search.

    Args:
        points: The points.
        wanted_mse: The least MSE.
        smaller_hides_more: Whether a smaller value is a stronger defence, as of ε.
    """
    found: dict[str, FrontierPoint | None] = {}
    for split in dict.fromkeys(point.place.split for point in points):
        able = [point for point in points if point.place.split == split and point.mse.value >= wanted_mse]
        order = sorted(able, key=lambda point: point.place.strength or 0.0, reverse=smaller_hides_more)
        words = next(point.place.split_words for point in points if point.place.split == split)
        found[words] = order[0] if order else None
    return found
