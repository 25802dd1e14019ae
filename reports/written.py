"""The files of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cleave.reports.csv_file import write_csv


def write_files(
    output: Path, contents: Mapping[str, bytes], table: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Path]:
    """Write what a report is made of into a folder, which is made where it is missing.

    Args:
        output: The folder.
        contents: Files by name, such as JSON and pictures.
        table: Name of the CSV.
        rows: Its rows, see :func:`~cleave.reports.csv_file.write_csv`.

    Returns:
        The files by their names, the table last.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (output / name).write_bytes(content)
    write_csv(output / table, rows)
    return {name: output / name for name in [*contents, table]}
