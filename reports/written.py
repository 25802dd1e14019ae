"""The files of a report."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
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


@contextlib.contextmanager
def naming_output(file: Path) -> Iterator[None]:
    """Let an error of writing, such as a full disk, name the setting ``output``, which says where."""
    try:
        yield
    except OSError as error:
        # Of several folders that are made, the error names the one that could not be.
        at = "" if error.filename in (None, str(file)) else f" ({error.filename})"
        raise type(error)(
            f"output={file} cannot be written: {error.strerror or error}{at}; name another place"
        ) from error


def try_file(path: Path) -> None:
    """Open a file for writing without a change to what it holds, and leave nothing that was not there before."""
    missing = [each for each in path.parents if not os.path.lexists(each)]
    new = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not os.path.lexists(path)
        with path.open("xb" if new else "ab"):
            pass
    finally:
        if new:
            with contextlib.suppress(OSError):
                path.unlink()
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
