"""The plots of plans: latency and throughput over the rate, and the Gantt chart of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cleave.planning import Simulation
from cleave.planning.planners.plan import STAGES
from cleave.reports.planning.tables import Row
from cleave.reports.plotting import COLORS, legend, matplotlib_defaults, new_figure, png, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINES = ("local", "server")


def rates_plot(rows: Sequence[Row], title: str) -> bytes:
    """Draw latency and throughput of every plan over the rate up, as a PNG.

    Args:
        rows: Those of :func:`~cleave.reports.planning.tables.plan_rows` at several rates.
        title: Above the plot.

    Raises:
        ValueError: There are no rows.
    """
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    if not rows:
        raise ValueError("there is nothing to draw: no rate was planned for")
    names = list(dict.fromkeys(row["plan"] for row in rows))
    looks = styles({name: name in BASELINES for name in names})
    rates = sorted({row["rate"] for row in rows})
    with matplotlib_defaults():
        figure = new_figure(6.4)
        top, bottom = figure.subplots(2, sharex=True)
        handles: list[tuple[str, Any]] = []
        for name in names:
            own = [row for row in rows if row["plan"] == name]
            look = {"color": looks[name].color, "marker": looks[name].marker, "linestyle": looks[name].dash}
            where = [row["rate"] for row in own]
            (line,) = top.plot(where, [1e3 * row["latency"] for row in own], **look, markersize=5)
            bottom.plot(where, [row["throughput"] for row in own], **look, markersize=5)
            handles.append((name, line))
        for axes in (top, bottom):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(color="#dddddd", linewidth=0.8)
            _bare(axes)
        bottom.set_xticks(rates)
        bottom.xaxis.set_minor_locator(NullLocator())
        bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        top.set_title(title, fontsize=11, parse_math=False)
        top.set_ylabel("Latency (ms)")
        bottom.set_ylabel("Tasks per second")
        bottom.set_xlabel("Rate up (Mbit/s)")
        legend(figure, handles)
        return png(figure)


def gantt_plot(found: Simulation, title: str) -> bytes:
    """Draw what each station does when, one colour a task, as a PNG."""
    with matplotlib_defaults():
        figure = new_figure(3.2)
        axes = figure.add_subplot()
        for span in found.spans:
            color = COLORS[span.task % len(COLORS)]
            axes.barh(span.station, 1e3 * (span.end - span.start), left=1e3 * span.start, color=color, height=0.7)
        axes.set_yticks(range(len(STAGES)), STAGES)
        axes.set_ylim(len(STAGES) - 0.5, -0.5)
        axes.set_xlabel("Time (ms); one colour a task")
        axes.set_title(title, fontsize=11, parse_math=False)
        _bare(axes)
        return png(figure)


def _bare(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
