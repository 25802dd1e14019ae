"""What a bundle answered, image by image: a table, and how much of it is right."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from cleave.reports.terminal import console, say, table

SHOWN = 32


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

    def row(self) -> dict[str, Any]:
        """Return it as plain values, as a file of answers holds it."""
        return {**dataclasses.asdict(self), "correct": self.correct}


class Tally:
    """What answers come to, added up as they come, and the first of them: as many as a table shows, however many come.

    Attributes:
        count: How many there are.
        first: The first ones.
        labelled: How many images have a known class.
        right: How many of these were answered rightly.
        payload_bytes: What was sent in all; ``least`` and ``most`` are of one image.
        exits: How many images left at each exit, by its name.
    """

    def __init__(self) -> None:
        # A terminal shows as much as fits; where nobody knows how much that is, as in a pipe, there is a fixed number.
        self.shown = max(12, console.height - 16) if console.is_terminal else SHOWN
        self.first: list[Answer] = []
        self.count = self.labelled = self.right = 0
        self.payload_bytes = self.least = self.most = 0
        self.exits: collections.Counter[str] = collections.Counter()
        # Of images that are files: how many, how many of them are smaller than what was sent, and the bytes of both.
        self.files = self.smaller_files = self.file_bytes = self.sent_for_files = 0

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        sent = answer.payload_bytes
        self.least = sent if not self.count else min(self.least, sent)
        self.most = max(self.most, sent)
        self.count += 1
        self.payload_bytes += sent
        if len(self.first) < self.shown:
            self.first.append(answer)
        if answer.correct is not None:
            self.labelled += 1
            self.right += answer.correct
        if answer.exit is not None:
            self.exits[answer.exit] += 1
        if answer.file_bytes is not None:
            self.files += 1
            self.smaller_files += sent > answer.file_bytes
            self.file_bytes += answer.file_bytes
            self.sent_for_files += sent

    @property
    def mean_bytes(self) -> float:
        """Mean of what was sent for an image."""
        return self.payload_bytes / self.count


def print_answers(title: str, tally: Tally) -> None:
    """Print the first answers, as wide as fits, and how many of all are right."""
    first = tally.first
    columns: list[tuple[str, list[str]]] = [("prediction", [each.prediction for each in first])]
    columns += [("label", [each.label or "" for each in first])] if tally.labelled else []
    columns += [("confidence", [f"{each.confidence:.3f}" for each in first])]
    columns += [("payload bytes", [f"{each.payload_bytes:,}" for each in first])]
    columns += [("exit", [each.exit or "" for each in first])] if tally.exits else []
    taken = sum(max(map(len, [name, *cells])) + 3 for name, cells in columns) + 4
    room = max(12, console.width - taken)
    names = [each.image if len(each.image) <= room else f"…{each.image[1 - room :]}" for each in first]
    rows = list(zip(names, *(cells for _, cells in columns), strict=True))
    table(title, rows, ("image", *(name for name, _ in columns)))
    if tally.count > len(rows):
        say(f"… and {tally.count - len(rows):,} more; output=FILE.csv or output=FILE.jsonl writes all of them")
    if tally.labelled:
        share = tally.right / tally.labelled
        say(f"Accuracy: {share:.2%}, {tally.right:,} of {tally.labelled:,} images with a label")


def print_larger_than_files(tally: Tally) -> None:
    """Point out payloads that are larger than the image's own file, which could be sent instead."""
    if tally.smaller_files:
        payload, file = tally.sent_for_files / tally.files, tally.file_bytes / tally.files
        say(
            f"The payload is larger than the image's own file for {tally.smaller_files:,} of {tally.files:,} images "
            f"(on average {payload:,.1f} bytes against {file:,.1f}): sending the file would take less. {SMALLER}"
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
