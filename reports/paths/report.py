"""What a search for a path found, for a person and as files."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from cleave.architectures.linking.path import Path
from cleave.planning import PathProblem, SearchResult
from cleave.reports.paths.plots import iterations_plot, paths_plot
from cleave.reports.paths.tables import Row
from cleave.reports.terminal import console, number, table
from cleave.reports.written import write_files

TABLE = "paths.csv"
HEADER = ("path", "stage", "accuracy", "average accuracy", "Th_p / Th_0", "worth", "")


def print_search(rows: Sequence[Row], result: SearchResult) -> None:
    """Print the local network and the trained paths, what was found, and why the search ended.

    Args:
        rows: Those of :func:`~cleave.reports.paths.tables.path_rows`.
        result: What was found.
    """
    cells = [
        (
            row["kind"] if row["kind"] == "original" else str(Path(*(row[name] for name in Path._fields))),
            "" if row["stage"] is None else row["stage"],
            f"{100 * row['accuracy']:.2f} %",
            f"{100 * row['average_accuracy']:.2f} %",
            f"{row['throughput_ratio']:.3f}",
            number(row["value"]),
            "best" if row["best"] else "",
        )
        for row in rows
        if row["accuracy"] is not None
    ]
    table("Paths on the validation images", cells, HEADER)
    what = "the local network as it is" if result.path is None else f"the path {result.path}"
    console.print(f"Found: {what} ({result.reason})", soft_wrap=True, highlight=False, markup=False)


def write_search(
    folder: pathlib.Path, rows: Sequence[Row], problem: PathProblem, result: SearchResult, worth: str = "Reward"
) -> dict[str, pathlib.Path]:
    """Write the table of all paths as CSV and, where some were trained, the plots; return the files by their names.

    Args:
        folder: Where they go; those of an earlier state of the search are replaced.
        rows: Those of :func:`~cleave.reports.paths.tables.path_rows`.
        problem: What was searched.
        result: What was found.
        worth: What paths are worth, for the axis.
    """
    drawn = {}
    if result.trained:
        drawn = {"paths.png": paths_plot(rows), "iterations.png": iterations_plot(problem, result, worth)}
    return write_files(folder, drawn, TABLE, rows)
