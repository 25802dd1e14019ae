"""The look of the plots: colours that everyone can tell apart, axes of bytes and accuracy, a legend beside them."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's muted scheme: nine colours told apart by every kind of colour vision.
COLORS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#DDCC77", "#44AA99", "#AA4499", "#999933")
GREYS = ("#444444", "#777777", "#AAAAAA")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # of another number than the colours: pairs repeat late
WIDTH, DPI = 9.0, 150  # inches, and dots per inch


class Style(NamedTuple):
    """How a line is drawn."""

    color: str
    marker: str
    dash: str


def styles(baseline: Mapping[str, bool]) -> dict[str, Style]:
    """Give every line, by its name and whether it is a baseline, a look; baselines are grey and dashed."""
    runs = zip((name for name, dashed in baseline.items() if not dashed), cycle(COLORS), cycle(MARKERS), strict=False)
    others = zip((name for name, dashed in baseline.items() if dashed), cycle(GREYS), cycle(MARKERS), strict=False)
    looks = {name: Style(color, marker, "-") for name, color, marker in runs}
    return looks | {name: Style(color, marker, "--") for name, color, marker in others}


@contextmanager
def matplotlib_defaults() -> Iterator[None]:
    """Draw with matplotlib's own defaults, whatever the user's settings, so that equal points make equal pictures."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def new_figure(height: float) -> Figure:
    """Return an empty figure that keeps its labels inside; no state of ``pyplot`` is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Return the picture of a figure, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def byte_limits(values: Iterable[float]) -> tuple[float, float]:
    """Return the powers of two around some numbers of bytes, with room beside them: there are always two ticks."""
    exponents = [math.log2(value) for value in values]
    return 2.0 ** math.floor(min(exponents) - 0.15), 2.0 ** math.ceil(max(exponents) + 0.15)


def byte_axis(axes: Axes, values: Iterable[float], log: bool) -> None:
    """Make the x axis one of payload bytes, with powers of two as ticks where it is logarithmic."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    values = list(values)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_xlim(*byte_limits(values))
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=11))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.06 * max(values))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlabel("Payload (bytes per image)")


def accuracy_axis(axes: Axes, values: Iterable[float], title: str) -> None:
    """Make the y axis one of accuracy in per cent, with room above and below the values, under a title."""
    values = list(values)
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.5)
    axes.set_ylim(low - room, high + room)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("Accuracy (%)")
    axes.set_title(textwrap.fill(title, 50), fontsize=11, parse_math=False)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, handles: Sequence[tuple[str, Any]], **layout: Any) -> None:
    """Write a legend beside the axes and make the figure as high as it needs.

    Names are taken as they are, be there a ``$`` or a ``_`` in them.
    """
    box = figure.legend(
        [handle for _, handle in handles],
        [str(i) for i in range(len(handles))],
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        handlelength=3,
        **layout,
    )
    for text, (name, _) in zip(box.get_texts(), handles, strict=True):
        text.set_parse_math(False)
        text.set_text(textwrap.fill(name, 30))
    inches = box.get_window_extent().height / figure.dpi + 0.3
    figure.set_figheight(max(figure.get_figheight(), inches))
