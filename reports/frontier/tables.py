"""The tables of a privacy frontier, for a person, as CSV and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cleave.reports.attacks.metrics import Interval
from cleave.reports.frontier.points import FrontierPoint, on_front
from cleave.reports.terminal import number, say, short, table

SCHEMA = 1


def frontier_rows(points: Sequence[FrontierPoint]) -> list[dict[str, Any]]:
    """Return a row for each point, intervals beside the means."""
    rows = []
    for point, front in zip(points, on_front(points), strict=True):
        row: dict[str, Any] = {"layer": point.place.layer, "bits": point.place.bits, "channels": point.place.channels}
        row |= {"strength": point.place.strength, "accuracy": point.accuracy, "validation": point.validation}
        for name in ("mse", "explained", "ssim"):
            found: Interval | None = getattr(point, name)
            row |= {name: found and found.value}
            row |= {f"{name}_{end}": found and getattr(found, end) for end in ("low", "high")}
        row |= {"distance_correlation": point.distance_correlation}
        row |= {"distance_correlation_spread": point.distance_correlation_spread}
        row |= {"payload_bytes": point.payload_bytes, "device_macs": point.device_macs}
        row |= {"device_params": point.device_params, "attack": point.attack, "front": front}
        row |= {"checkpoint": point.details.get("checkpoint")}
        rows.append(row)
    return rows


def print_frontier(points: Sequence[FrontierPoint], strength: str | None) -> None:
    """Print all points, those on the front with a star.

    Args:
        points: The points.
        strength: What the strength is called; ``None`` where none is varied.
    """
    header = ("point", "accuracy", "MSE", "explained", "SSIM", "dCor", "bytes", "MACs")
    rows = []
    for point, front in zip(points, on_front(points), strict=True):
        correlation = point.distance_correlation
        rows.append(
            (
                f"{point.place.words(strength)}{' *' if front else ''}",
                f"{100 * point.accuracy:.2f} %",
                f"{point.mse.value:.4f}",
                f"{point.explained.value:.3f} [{point.explained.low:.3f}, {point.explained.high:.3f}]",
                "" if point.ssim is None else f"{point.ssim.value:.3f}",
                "" if correlation is None else f"{correlation:.3f}",
                number(point.payload_bytes),
                "" if point.device_macs is None else short(point.device_macs),
            )
        )
    table("Accuracy on test images, and the strongest attacker of each point with its 95 % interval", rows, header)
    say("* no other point is more accurate and explains less. Explained: 1 is a full leak, 0 the mean image.")


def print_wanted(
    points: Sequence[FrontierPoint],
    wanted: float,
    best: FrontierPoint | None,
    weakest: Mapping[str, FrontierPoint | None],
    strength: str | None,
) -> None:
    """Print which point reaches a wanted MSE at the best accuracy, and the least strength that does.

    Args:
        points: All points.
        wanted: The MSE that the lowest one should reach.
        best: Of those that reach it, the most accurate on validation images.
        weakest: The least strength by split.
        strength: What the strength is called.
    """
    if best is None:
        most = max(points, key=lambda point: point.mse.value)
        say(
            f"None of {len(points)} points reaches the wanted MSE of {wanted:g}: the highest lowest MSE is "
            f"{most.mse.value:.4g}, of {most.place.words(strength)}"
        )
        return
    say(
        f"Wanted MSE of {wanted:g}: best is {best.place.words(strength)} with {best.mse.value:.4g} at "
        f"{100 * best.accuracy:.2f} %; chosen by its validation images, {best.validation:.4g}"
    )
    if strength is None:
        return
    for split, point in weakest.items():
        found = (
            "none reaches it" if point is None else f"{strength} {point.place.strength:g} is the weakest to reach it"
        )
        say(f"  {split}: {found}")


def as_report(
    points: Sequence[FrontierPoint],
    strength_key: str | None,
    wanted: float | None,
    best: FrontierPoint | None,
    weakest: Mapping[str, FrontierPoint | None],
) -> dict[str, Any]:
    """Return everything as JSON can hold it."""
    front = on_front(points)
    return {
        "schema": SCHEMA,
        "strength": strength_key,
        "points": [{**point.as_values(), "front": on} for point, on in zip(points, front, strict=True)],
        "wanted_mse": wanted,
        "best": None if best is None else best.as_values()["place"],
        "weakest": {split: None if point is None else point.place.strength for split, point in weakest.items()},
    }
