"""The plots of a report: accuracy over bytes, and the three-way trade-off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cleave.reports.plotting import (
    Style,
    accuracy_axis,
    byte_axis,
    legend,
    matplotlib_defaults,
    new_figure,
    png,
    styles,
)
from cleave.reports.rates.fronts import Setting, trade_offs
from cleave.reports.terminal import short


def lines(known: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Gather settings into lines: one a method, or one a method and backbone where there are several backbones."""
    result: dict[str, list[Setting]] = {}
    for setting in sorted(known, key=lambda s: (s.kind != "run", s.method, s.backbone or "", s.payload_bytes)):
        result.setdefault(line_name(setting, known), []).append(setting)
    return result


def line_name(setting: Setting, known: Sequence[Setting]) -> str:
    """Return the name of the line that a setting belongs to among others."""
    name = setting.method
    if len({s.kind for s in known if s.method == name}) > 1:
        name += f", {setting.kind}"
    if len({s.backbone for s in known}) > 1:
        name += f" ({setting.backbone or 'unknown backbone'})"
    return name


def rate_plot(known: Sequence[Setting], reference: float | None, title: str | None, log_x: bool) -> bytes:
    """Draw accuracy over payload bytes, one line per method, as a PNG.

    Args:
        known: The settings.
        reference: Accuracy of the unsplit network, drawn as a level.
        title: Title; ``None`` for none.
        log_x: Whether the axis of bytes is logarithmic.
    """
    drawn = lines(known)
    looks = styles({name: line[0].kind == "baseline" for name, line in drawn.items()})
    heights = [100 * (s.accuracy + sign * (s.accuracy_std or 0)) for s in known for sign in (-1, 1)]
    handles: list[tuple[str, Any]] = []
    with matplotlib_defaults():
        figure = new_figure(5.0)
        axes = figure.add_subplot()
        for name, line in drawn.items():
            look = looks[name]
            bars = axes.errorbar(
                [s.payload_bytes for s in line],
                [100 * s.accuracy for s in line],
                yerr=[100 * (s.accuracy_std or 0) for s in line] if any(s.accuracy_std for s in line) else None,
                color=look.color,
                marker=look.marker,
                linestyle=look.dash,
                capsize=3,
            )
            handles.append((name, bars))
        if reference is not None:
            level = axes.axhline(100 * reference, color="black", linestyle=":", linewidth=1.5)
            handles.append((f"unsplit network: {100 * reference:.1f} %", level))
            heights.append(100 * reference)
        byte_axis(axes, [s.payload_bytes for s in known], log_x)
        accuracy_axis(axes, heights, title or "")
        legend(figure, handles)
        return png(figure)


def tradeoff_plot(known: Sequence[Setting], title: str | None, log_x: bool) -> bytes:
    """Draw accuracy over payload bytes with parameters on the device as area, one panel per backbone, as a PNG.

    What is on the Pareto front is outlined, all else is pale.

    Args:
        known: The settings, at least one with its parameters.
        title: Title; ``None`` for none.
        log_x: Whether the axis of bytes is logarithmic.
    """
    groups = trade_offs(known)
    drawn = [row.setting for rows in groups.values() for row in rows]
    looks = styles({name: line[0].kind == "baseline" for name, line in lines(known).items()})
    sizes = sorted({s.encoder_params or 0 for s in drawn})

    def area(setting: Setting) -> float:
        return _area(setting.encoder_params or 0, sizes[-1])

    with matplotlib_defaults():
        figure = new_figure(max(5.0, 3.8 * len(groups)))
        panels = figure.subplots(len(groups), squeeze=False)[:, 0]
        for axes, (backbone, rows) in zip(panels, groups.items(), strict=True):
            for setting, front in sorted(rows, key=lambda row: (row.front, -area(row.setting))):
                color, marker, _ = looks[line_name(setting, known)]
                edge = {"edgecolor": "black", "linewidth": 1.4} if front else {"edgecolor": "none", "alpha": 0.4}
                at = setting.payload_bytes, 100 * setting.accuracy
                axes.scatter(*at, area(setting), facecolor=color, marker=marker, zorder=3 if front else 2, **edge)
            byte_axis(axes, [s.payload_bytes for s in drawn], log_x)
            heading = ": ".join(filter(None, (title, backbone or "unknown backbone")))
            accuracy_axis(axes, [100 * row.setting.accuracy for row in rows], heading)
        names = {line_name(s, known) for s in drawn}
        legend(figure, _keys({name: look for name, look in looks.items() if name in names}, sizes), labelspacing=0.9)
        return png(figure)


def _keys(looks: dict[str, Style], sizes: Sequence[int]) -> list[tuple[str, Any]]:
    """The legend of a trade-off: the lines' marks, the front's outline, and the area of up to three sizes."""
    from matplotlib.lines import Line2D

    def key(**look: Any) -> Line2D:
        return Line2D([], [], linestyle="none", **{"color": "#777777", "marker": "o", "markersize": 7, **look})

    keys = [(name, key(color=look.color, marker=look.marker)) for name, look in looks.items()]
    keys.append(("on the Pareto front", key(color="none", markeredgecolor="black", markeredgewidth=1.4)))
    shown = dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    return keys + [(f"{short(n)} parameters", key(markersize=_area(n, sizes[-1]) ** 0.5)) for n in shown]


def _area(params: int, most: int) -> float:
    """The area of a mark in square points: a dot for no parameters, then in proportion."""
    return 30 + 250 * params / max(most, 1)
