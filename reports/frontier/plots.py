"""The plot of a privacy frontier: accuracy against what an adversary explains, and against its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cleave.reports.frontier.points import FrontierPoint, on_front
from cleave.reports.plotting import accuracy_axis, legend, matplotlib_defaults, new_figure, png, styles


def frontier_plot(points: Sequence[FrontierPoint], strength: str | None, wanted: float | None) -> bytes:
    """Draw accuracy against what is explained, each split a line along its strengths, the front ringed, as a PNG.

    The upper axis is the lowest MSE: of one set of targets either says the other.

    Args:
        points: The points, at least one.
        strength: What the strength is called; its values stand beside the points.
        wanted: A wanted MSE, drawn as a line.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("there is nothing to draw: no point was attacked")
    mean = points[0].mse.value / (1 - points[0].explained.value) if points[0].explained.value < 1 else None
    splits = list(dict.fromkeys(point.place.split_words for point in points))
    looks = styles(dict.fromkeys(splits, False))
    with matplotlib_defaults():
        figure = new_figure(5.2)
        axes = figure.subplots()
        handles: list[tuple[str, Any]] = []
        for name in splits:
            own = sorted(
                (point for point in points if point.place.split_words == name),
                key=lambda point: point.place.strength or 0.0,
            )
            look, xs, ys = looks[name], [p.explained.value for p in own], [100 * p.accuracy for p in own]
            (line,) = axes.plot(xs, ys, color=look.color, marker=look.marker, linewidth=1, alpha=0.9)
            # A bootstrap interval of percentiles need not hold the mean itself.
            ends = [[max(0.0, p.explained.value - p.explained.low) for p in own]]
            ends += [[max(0.0, p.explained.high - p.explained.value) for p in own]]
            axes.errorbar(xs, ys, xerr=ends, fmt="none", ecolor=look.color, elinewidth=1, alpha=0.5)
            handles.append((name, line))
            for point, x, y in zip(own, xs, ys, strict=True):
                if point.place.strength is not None:
                    words = f"{point.place.strength:g}"
                    axes.annotate(words, (x, y), (5, 5), textcoords="offset points", fontsize=8, parse_math=False)
        ringed = [point for point, front in zip(points, on_front(points), strict=True) if front]
        ringed.sort(key=lambda point: point.explained.value)
        (ring,) = axes.plot(
            [point.explained.value for point in ringed],
            [100 * point.accuracy for point in ringed],
            color="black",
            linestyle=":",
            marker="o",
            markersize=13,
            fillstyle="none",
            linewidth=1,
        )
        handles.append(("front: no other point has both a higher accuracy and less explained", ring))
        if wanted is not None and mean is not None and wanted <= mean:  # beyond, there would be nothing but the line
            mark = axes.axvline(1 - wanted / mean, color="#777777", linestyle="--", linewidth=1)
            handles.append((f"wanted MSE: {wanted:g}", mark))
        named = "" if strength is None else f", by {strength}"
        accuracy_axis(axes, [100 * point.accuracy for point in points], f"Accuracy and what is rebuilt{named}")
        axes.set_xlabel("Explained by the strongest attacker: 1 is a full leak, 0 the mean image")
        if mean is not None:
            _mse_axis(axes, mean)
        legend(figure, handles)
        return png(figure)


def _mse_axis(axes: Any, mean: float) -> None:
    """Put the lowest MSE above what is explained."""
    upper = axes.secondary_xaxis("top", functions=(lambda x: (1 - x) * mean, lambda mse: 1 - mse / mean))
    upper.set_xlabel("Lowest MSE over attackers")
    upper.tick_params(labelsize=8)
