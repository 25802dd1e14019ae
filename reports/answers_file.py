"""A file of answers, written line by line as they come: what stops a run leaves those that it had."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cleave.reports.csv_file import csv_writer
from cleave.reports.written import naming_output, try_file

ENDINGS = (".csv", ".jsonl")


def check_file(file: str | None) -> Path | None:
    """Return where answers are to be written, having tried whether they can be; what is there stays as it is.

    Raises:
        ValueError: The name has another ending than those of the formats known, or names a folder.
        OSError: Nothing can be written there.
    """
    if file is None:
        return None
    path = Path(str(file))
    if path.suffix.lower() not in ENDINGS or path.is_dir():
        raise ValueError(f"output={file} must be a file that ends in .csv or .jsonl (a JSON object a line)")
    if path.exists() and not path.is_file():
        return path  # a pipe, which only waits for its reader
    with naming_output(path):
        try_file(path)
    return path


class AnswersFile:
    """Writes answers to a file as they come, each of them whole.

    The file is opened for the first answer: until then what it held before is left alone.

    Args:
        file: The file, CSV or JSON lines by the ending of its name; ``None``: nothing is written.

    Attributes:
        lines: How many answers are in it.

    Raises:
        OSError: It cannot be written, such as on a full disk; the answers before are in it.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self.lines = file, 0
        self._stream: BinaryIO | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Write an answer; a name that is not UTF-8 is written with its bytes escaped."""
        if self.file is None:
            return
        name = row["image"].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        with naming_output(self.file):
            self._append(self._text({**row, "image": name}).encode("utf-8", "backslashreplace"))
        self.lines += 1

    def told(self) -> str:
        """Say what the file holds, where something has stopped the run."""
        if not self.lines:
            return f"There was no answer yet, so output={self.file} was not written."
        return f"{self.lines:,} {'answer is' if self.lines == 1 else 'answers are'} kept in {self.file}"

    def close(self) -> None:
        """Close it."""
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _text(self, row: Mapping[str, Any]) -> str:
        if self.file is None or self.file.suffix.lower() != ".csv":
            return f"{json.dumps(row, ensure_ascii=False)}\n"
        text = io.StringIO()
        writer = csv_writer(text, row)
        if not self.lines:
            writer.writeheader()
        writer.writerow(row)
        return text.getvalue()

    def _append(self, content: bytes) -> None:
        assert self.file is not None
        if self._stream is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer nothing waits in this process, and nothing fails at the end that is not told here.
            self._stream = self.file.open("wb", buffering=0)
        whole = self._stream.tell() if self._stream.seekable() else None
        try:
            while content:
                content = content[self._stream.write(content) :]
        except BaseException:  # a signal as well
            if whole is not None:
                with contextlib.suppress(OSError):
                    self._stream.truncate(whole)
            raise
