"""The plots of a report on early exits: accuracy over cost, who leaves where, and each exit alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cleave.reports.plotting import accuracy_axis, legend, matplotlib_defaults, new_figure, png, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = Mapping[str, Any]
COST = {
    "macs": "Mean MACs per image (% of the backbone's)",
    "seconds": "Mean seconds per image (% of the backbone's)",
    "given": "Mean cost per image (% of the last exit's)",
}


def accuracy_plot(report: Report) -> bytes:
    """Draw accuracy over mean cost, one line a policy, as a PNG.

    Marks on a line are its calibrated points; the exits stand where all samples would leave there.
    """
    looks = styles(dict.fromkeys(report["policies"], False))
    last, exits = report["last_exit"], report["exits"]
    handles: list[tuple[str, Any]] = []
    heights = [100 * accuracy for figures in report["policies"].values() for _, accuracy in figures["curve"]]
    with matplotlib_defaults():
        figure = new_figure(5.0)
        axes = figure.add_subplot()
        for kind, figures in report["policies"].items():
            look = looks[kind]
            line = zip(*((100 * cost, 100 * accuracy) for cost, accuracy in figures["curve"]), strict=True)
            axes.plot(*line, color=look.color, linewidth=1.8, alpha=0.85)
            points = [point for point in [*figures["points"], figures["best"]] if point["accuracy"] is not None]
            at = [100 * point["cost"] for point in points], [100 * point["accuracy"] for point in points]
            axes.plot(*at, color=look.color, marker=look.marker, linestyle="none", markersize=6, zorder=4)
            heights += at[1]
            handles.append((kind, _key(color=look.color, marker=look.marker, markersize=6, linewidth=1.8)))
        handles.append(("marks: calibrated on val", _key(linestyle="none", color="#777777", marker="o", markersize=6)))
        at = [100 * exit["cost"] for exit in exits], [100 * exit["accuracy"] for exit in exits]
        axes.plot(*at, linestyle="none", marker="o", markersize=9, color="black", markerfacecolor="none", zorder=5)
        for exit, x, y in zip(exits, *at, strict=True):
            axes.annotate(
                exit["name"], (x, y), (0, -9), textcoords="offset points", ha="center", va="top", fontsize=8, zorder=6
            ).set_parse_math(False)
        handles.append(
            ("all leave at one exit", _key(linestyle="none", color="black", marker="o", markerfacecolor="none"))
        )
        level = axes.axhline(100 * last["accuracy"], color="black", linestyle="--", linewidth=1.2, zorder=1)
        handles.append((f"last exit alone: {100 * last['accuracy']:.1f} %", level))
        axes.axvline(100, color="#999999", linestyle=":", linewidth=1.2, zorder=1)
        accuracy_axis(axes, [*heights, *at[1], 100 * last["accuracy"]], "")
        _cost_axis(axes, report)
        legend(figure, handles)
        return png(figure)


def shares_plot(report: Report) -> bytes:
    """Draw the share of samples that leaves at each exit over the mean cost, one panel a policy, as a PNG."""
    import matplotlib

    names = [exit["name"] for exit in report["exits"]]
    policies = report["policies"]
    with matplotlib_defaults():
        colors = matplotlib.colormaps["viridis"]([0.92 - 0.77 * i / (len(names) - 1) for i in range(len(names))])
        figure = new_figure(1.0 + 1.9 * len(policies))
        panels = figure.subplots(len(policies), sharex=True, squeeze=False)[:, 0]
        for axes, (kind, figures) in zip(panels, policies.items(), strict=True):
            _stack(axes, [100 * cost for cost, _ in figures["curve"]], figures["curve_shares"], colors)
            axes.set_ylim(0, 100)
            axes.set_ylabel("Samples (%)")
            axes.set_title(kind, fontsize=11, loc="left", parse_math=False)
            axes.spines[["top", "right"]].set_visible(False)
        _cost_axis(panels[-1], report)
        keys = [_key(color=color, linewidth=8) for color in colors]
        legend(figure, [(f"leave at {name}", key) for name, key in zip(names, keys, strict=True)][::-1])
        return png(figure)


def _stack(axes: Axes, x: Sequence[float], shares: Sequence[Sequence[float]], colors: Any) -> None:
    """Stack shares over costs: as areas, or as bars where there are too few costs to join."""
    layers = [[100 * row[i] for row in shares] for i in range(len(shares[0]))]
    if len(set(x)) >= 12:
        axes.stackplot(x, layers, colors=colors, edgecolor="white", linewidth=0.5)
        return
    below = [0.0] * len(x)
    for layer, color in zip(layers, colors, strict=True):
        axes.bar(x, layer, width=2.0, bottom=below, color=color)
        below = [a + b for a, b in zip(below, layer, strict=True)]


def exits_plot(report: Report) -> bytes:
    """Draw each exit's accuracy, and its calibration error before and after temperature scaling, as a PNG."""
    exits = report["exits"]
    places = range(len(exits))
    with matplotlib_defaults():
        figure = new_figure(5.6)
        top, bottom = figure.subplots(2, sharex=True)
        accuracies = [100 * exit["accuracy"] for exit in exits]
        bars = top.bar(places, accuracies, width=0.8, color="#332288")
        top.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        accuracy_axis(top, accuracies, "")
        top.set_ylim(0, 108)  # bars begin at nothing
        handles: list[tuple[str, Any]] = [("accuracy", bars)]
        looks = {"ece": ("ECE", -0.2, "#CC6677"), "ece_scaled": ("ECE, logits scaled by a temperature", 0.2, "#44AA99")}
        for key, (name, aside, color) in looks.items():
            bars = bottom.bar([i + aside for i in places], [exit[key] for exit in exits], width=0.38, color=color)
            handles.append((name, bars))
        bottom.set_ylabel("Calibration error")
        for axes in (top, bottom):
            axes.grid(axis="x", visible=False)
            axes.spines[["top", "right"]].set_visible(False)
        bottom.grid(axis="y", color="#dddddd", linewidth=0.8)
        bottom.set_axisbelow(True)
        names = [f"{exit['name']}\n{100 * exit['cost']:.0f} %" for exit in exits]
        bottom.set_xticks(list(places), names, fontsize=8, rotation=45 if len(exits) > 8 else 0, parse_math=False)
        bottom.set_xlabel(f"Exit, and leaving there: {COST[report['costs']['unit']].removeprefix('Mean ')}")
        legend(figure, handles)
        return png(figure)


def _key(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _cost_axis(axes: Axes, report: Report) -> None:
    cheapest = 100 * min(exit["cost"] for exit in report["exits"])
    dearest = 100 * max(exit["cost"] for exit in report["exits"])
    room = 0.08 * (dearest - cheapest)
    axes.set_xlim(max(0.0, cheapest - room), max(dearest, 100) + room)
    axes.set_xlabel(COST[report["costs"]["unit"]])
