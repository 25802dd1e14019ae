"""What a bundle answered, image by image: a table, how much of it is right, and a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cleave.reports.csv_file import write_csv
from cleave.reports.terminal import console, say, table

SHOWN = 32  # where nobody knows how much fits, as in a pipe
ENDINGS = (".csv", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was answered of one image.

    Attributes:
        image: Its name.
        prediction: The class answered.
        label: Its class, where that is known.
        confidence: Softmax of the class answered, from 0 to 1.
        payload_bytes: What was sent.
        file_bytes: Length of the image's file, where it is one.
        exit: The exit where it left, of a network that has some.
    """

    image: str
    prediction: str
    label: str | None
    confidence: float
    payload_bytes: int
    file_bytes: int | None = None
    exit: str | None = None

    @property
    def correct(self) -> bool | None:
        """Whether the answer is right, where that is known."""
        return None if self.label is None else self.prediction == self.label


def check_file(file: str | None) -> Path | None:
    """Return where answers are to be written.

    Raises:
        ValueError: The name has another ending than those of the formats known, or names a folder.
    """
    if file is None:
        return None
    path = Path(str(file))
    if path.suffix.lower() not in ENDINGS or path.is_dir():
        raise ValueError(f"output={file} must be a file that ends in .csv or .jsonl (a JSON object a line)")
    return path


def write_answers(file: Path, answers: Sequence[Answer]) -> None:
    """Write every answer, as CSV or as JSON lines by the ending of the file's name."""
    rows: list[dict[str, Any]] = [{**dataclasses.asdict(answer), "correct": answer.correct} for answer in answers]
    for row in rows:  # a name that is not UTF-8 is written with its bytes escaped
        row["image"] = row["image"].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() == ".csv":
        write_csv(file, rows)
    else:
        file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def print_answers(title: str, answers: Sequence[Answer]) -> None:
    """Print the answers, as many and as wide as fit, and how many of them are right."""
    labels, exits = (any(getattr(each, key) is not None for each in answers) for key in ("label", "exit"))
    columns: list[tuple[str, list[str]]] = [("prediction", [each.prediction for each in answers])]
    columns += [("label", [each.label or "" for each in answers])] if labels else []
    columns += [("confidence", [f"{each.confidence:.3f}" for each in answers])]
    columns += [("payload bytes", [f"{each.payload_bytes:,}" for each in answers])]
    columns += [("exit", [each.exit or "" for each in answers])] if exits else []
    shown = max(12, console.height - 16) if console.is_terminal else SHOWN
    taken = sum(max(map(len, [name, *cells[:shown]])) + 3 for name, cells in columns) + 4
    room = max(12, console.width - taken)
    names = [each.image if len(each.image) <= room else f"…{each.image[1 - room :]}" for each in answers]
    rows = list(zip(names, *(cells for _, cells in columns), strict=True))
    table(title, rows[:shown], ("image", *(name for name, _ in columns)))
    if len(rows) > shown:
        say(f"… and {len(rows) - shown:,} more; output=FILE.csv or output=FILE.jsonl writes all of them")
    known = [each.correct for each in answers if each.correct is not None]
    if known:
        say(f"Accuracy: {sum(known) / len(known):.2%}, {sum(known):,} of {len(known):,} images with a label")


def print_larger_than_files(answers: Sequence[Answer]) -> None:
    """Point out payloads that are larger than the image's own file, which could be sent instead."""
    sizes = [(each.payload_bytes, each.file_bytes) for each in answers if each.file_bytes is not None]
    larger = [pair for pair in sizes if pair[0] > pair[1]]
    if larger:
        payload, file = (sum(each) / len(sizes) for each in zip(*sizes, strict=True))
        say(
            f"The payload is larger than the image's own file for {len(larger):,} of {len(sizes):,} images (on average "
            f"{payload:,.1f} bytes against {file:,.1f}): sending the file would take less. {SMALLER}"
        )


SMALLER = "Fewer bytes are sent with fewer bottleneck.channels or codec.bits, or a larger bottleneck.stride."


def say_if_larger(metrics: Mapping[str, Any]) -> None:
    """Point out that what a network sends is larger on average than the files of its images.

    Args:
        metrics: What a test logged.
    """
    ratio = float(metrics.get("test/payload_to_file", 0.0))
    if ratio > 1:
        say(f"A payload is {ratio:.3g} times as large as the image's own file. {SMALLER}")
