"""The tables of a report as CSV; that of its points can be read back."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cleave.reports.rates.results import COUNTS, TEXTS, Point, content, place

COLUMNS = tuple(field.name for field in dataclasses.fields(Point))


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the keys of the first; null is an empty cell, and numbers are written in full."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv_writer(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def csv_writer(stream: TextIO, first: Mapping[str, Any]) -> csv.DictWriter[str]:
    """Return what writes rows under the keys of the first one."""
    return csv.DictWriter(stream, list(first), lineterminator="\n")


def read_csv(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read what :func:`write_csv` wrote of points, as :func:`read_results` does.

    Raises:
        ValueError: The file is too long, has other columns, or a cell holds no number where one must stand.
    """
    try:
        reader = csv.DictReader(io.StringIO(content(file).decode("utf-8"), newline=""), strict=True)
        rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if tuple(reader.fieldnames or ()) != COLUMNS or not rows:
        raise ValueError(f"{file} is no rate_accuracy.csv of compare.py: its columns must be {', '.join(COLUMNS)}")
    return [(where := place(file, i, row), _typed(row, where)) for i, row in enumerate(rows)]


def _typed(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a CSV's row: of text, numbers again."""
    if None in row:  # where csv puts what no column is for
        raise ValueError(f"{where} has more cells than columns")
    values: dict[str, Any] = {}
    for name in COLUMNS:
        read = str if name in TEXTS else int if name in COUNTS else float
        try:
            values[name] = read(row[name]) if row[name] else None
        except ValueError as error:
            raise ValueError(f"{where}: {name} must be a number, got {row[name]!r}") from error
    return values
