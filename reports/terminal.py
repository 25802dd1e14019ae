"""What a person sees: tables of results, and the command to type next."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cleave.architectures import Cost


class _Terminal(Console):
    """A console that leaves to the command what becomes of it where nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        """Raise the error, where rich would end the process."""
        raise


# A pipe has no width of its own, and rich's guess of 80 columns would cut figures off.
console = _Terminal(width=None if (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ else 120)


def table(title: str, rows: Iterable[tuple[Any, ...]], header: tuple[str, ...] = ()) -> None:
    """Print rows under a title; columns after the first stand right. Without rows there is nothing to print.

    Nothing in them is markup, as names and paths may hold brackets and colons.
    """
    rows = [tuple(Text(str(cell)) for cell in row) for row in rows]
    if not rows:
        return
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    grid = Table(show_header=bool(header))
    for i in range(max(map(len, rows))):
        grid.add_column(Text(header[i] if header else ""), justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def results_table(title: str, metrics: Mapping[str, Any]) -> None:
    """Print measured metrics; per-class accuracies are summed up by the worst three."""
    per_class = {k.rpartition("/")[2]: float(v) for k, v in metrics.items() if "/acc_class/" in k}
    rows = [(name, number(float(value))) for name, value in metrics.items() if "/acc_class/" not in name]
    for name, value in sorted(per_class.items(), key=lambda item: item[1])[:3]:
        rows.append((f"accuracy of class {name}", number(value)))
    table(title, rows)


def cost_rows(costs: Sequence[Cost]) -> list[tuple[str, str, str]]:
    """Rows (part, MACs, parameters) of what a network costs."""
    return [(cost_words(cost), f"{cost.macs:,}", f"{cost.params:,}") for cost in costs]


def cost_words(cost: Cost) -> str:
    """Name a part of a network for a person: ``to layer1``, ``exit at layer1``, ``encoder at layer2``."""
    return f"to {cost.name}" if cost.kind == "stage" else f"{cost.kind} at {cost.name}"


def in_words(target: str) -> str:
    """Return the name of a class in words."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", str(target).rpartition(".")[2]).capitalize()


def number(value: float) -> str:
    """Format a number: whole ones in full, others with four significant digits."""
    whole = math.isfinite(value) and value == int(value)
    return f"{value:,.0f}" if whole and abs(value) >= 1000 else f"{value:.4g}"


def short(count: float) -> str:
    """Format a large count with three digits and a unit: 14.6 M."""
    for unit in ("", " k", " M", " G"):
        if count < 1000 or unit == " G":
            break
        count /= 1000
    return f"{count:.3g}{unit}"


def say(words: str) -> None:
    """Print a sentence as it is, unwrapped so that paths and commands can be copied."""
    console.print(Text(words), soft_wrap=True)


@contextmanager
def hushed() -> Iterator[None]:
    """Print nothing within: what runs there is a part of something larger, which says what it came to."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def say_next(command: str) -> None:
    """Print the command to type next."""
    console.print(Text.assemble("Next: ", (command, "bold")), soft_wrap=True)
