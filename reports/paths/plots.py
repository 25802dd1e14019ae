"""The plots of a search, after the papers': accuracy and throughput by path, and the worth by iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cleave.architectures.linking.path import Path
from cleave.planning import PathProblem, SearchResult
from cleave.reports.paths.tables import Row
from cleave.reports.plotting import COLORS, accuracy_axis, legend, matplotlib_defaults, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = 40  # names of paths that fit under an axis
PATH, AVERAGE, BEST = COLORS[0], COLORS[1], COLORS[2]


def paths_plot(rows: Sequence[Row]) -> bytes:
    """Draw accuracy and throughput by path, in multiples of the local network's, as a PNG.

    Args:
        rows: Those of :func:`~cleave.reports.paths.tables.path_rows`; paths that were not trained are left out.

    Raises:
        ValueError: No path was trained.
    """
    original = next(row for row in rows if row["kind"] == "original")
    trained = sorted((row for row in rows if row["kind"] != "original" and row["accuracy"] is not None), key=_order)
    if not trained:
        raise ValueError("there is nothing to draw: no path was trained")
    places = range(len(trained))
    accuracies = [100 * row["accuracy"] for row in trained]
    averages = [100 * row["average_accuracy"] for row in trained]
    level = 100 * original["accuracy"]
    with matplotlib_defaults():
        figure = new_figure(6.2)
        top, bottom = figure.subplots(2, sharex=True)
        dots = {"linestyle": "none", "markersize": 6}
        (own,) = top.plot(places, accuracies, color=PATH, marker="o", **dots)
        (average,) = top.plot(places, averages, color=AVERAGE, marker="^", **dots)
        alone = top.axhline(level, color="black", linestyle=":", linewidth=1.5)
        accuracy_axis(top, [*accuracies, *averages, level], "")
        colors = [BEST if row["best"] else PATH for row in trained]
        bottom.bar(places, [row["throughput_ratio"] for row in trained], color=colors)
        bottom.axhline(1, color="black", linestyle=":", linewidth=1.5)
        bottom.set_ylabel(r"$Th_p / Th_0$")
        bottom.set_xlabel("Path [lout, hin, hout, lin]")
        step = -(-len(trained) // LABELS)
        shown = range(0, len(trained), step)
        bottom.set_xticks(list(shown), [_name(trained[i]) for i in shown], rotation=90, fontsize=8)
        bottom.grid(axis="y", color="#dddddd", linewidth=0.8)
        _bare(bottom)
        handles: list[tuple[str, Any]] = [
            ("over the path", own),
            ("over all images, with those answered alone", average),
        ]
        handles.append((f"local network: {level:.1f} %", alone))
        if any(row["best"] for row in trained):
            handles.append(("the path that was found", _patch(BEST)))
        legend(figure, handles)
        return png(figure)


def iterations_plot(problem: PathProblem, result: SearchResult, name: str = "Reward") -> bytes:
    """Draw what each trained path is worth in the order of training, and the best so far, as a PNG.

    Args:
        problem: What was searched.
        result: What was found.
        name: What paths are worth, for the axis.

    Raises:
        ValueError: No path was trained.
    """
    from matplotlib.ticker import MaxNLocator

    if not result.trained:
        raise ValueError("there is nothing to draw: no path was trained")
    values = [one.value for one in result.trained]
    predicted = [
        (i, problem.worth(one.path, one.predicted))
        for i, one in enumerate(result.trained, 1)
        if one.predicted is not None
    ]
    best = [max(problem.original_value, *values[:i]) for i in range(1, len(values) + 1)]
    with matplotlib_defaults():
        figure = new_figure(5.0)
        axes = figure.add_subplot()
        numbers = range(1, len(values) + 1)
        handles: list[tuple[str, Any]] = []
        (dots,) = axes.plot(numbers, values, color=PATH, marker="o", linestyle="none", markersize=6, zorder=3)
        handles.append(("measured", dots))
        if predicted:
            (rings,) = axes.plot(
                *zip(*predicted, strict=True), color=AVERAGE, marker="D", linestyle="none", markerfacecolor="none"
            )
            handles.append(("predicted before", rings))
        (line,) = axes.step(numbers, best, where="post", color=BEST, linewidth=1.8, zorder=2)
        handles.append(("best so far", line))
        alone = axes.axhline(problem.original_value, color="black", linestyle=":", linewidth=1.5)
        handles.append((f"local network: {problem.original_value:.3f}", alone))
        axes.set_xlabel("Paths trained")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#dddddd", linewidth=0.8)
        _bare(axes)
        legend(figure, handles)
        return png(figure)


def _order(row: Row) -> tuple[Any, ...]:
    """Skip-connections last, all others by their blocks."""
    return row["kind"] == "skip", *(-1 if row[name] is None else row[name] for name in Path._fields)


def _name(row: Row) -> str:
    return str(Path(*(row[name] for name in Path._fields)))


def _bare(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _patch(color: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color)
