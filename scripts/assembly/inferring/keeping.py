"""What becomes of answers: each is counted and written as it comes, and what stops a run leaves them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cleave.deployment import Bundle, Result
from cleave.reports.answers import Answer, Tally, print_answers
from cleave.reports.answers_file import AnswersFile
from cleave.scripts.assembly.inferring.reading import Batch
from cleave.scripts.assembly.starting.stopping import stopped_by


class Keeper:
    """Takes the answers of batches.

    Args:
        bundle: What answers.
        file: Where answers are written.
        seen: Called with each answer.

    Attributes:
        tally: What all of them come to.
    """

    def __init__(self, bundle: Bundle, file: AnswersFile, seen: Callable[[Answer], None] | None) -> None:
        self.tally = Tally()
        self._bundle, self._file, self._seen = bundle, file, seen

    def add(
        self,
        batch: Batch,
        result: Result,
        failed: Collection[int] = (),
        lines: list[dict[str, Any]] | None = None,
    ) -> list[Mapping[str, Any]]:
        """Count and write the answers of a batch, and return what was written.

        Args:
            batch: What was asked.
            result: What came of it.
            failed: Rows that have no answer.
            lines: What is written of each row beside its image's name; ``None``: what the table shows.
        """
        written: list[Mapping[str, Any]] = []
        for row, answer in enumerate(answers_of(self._bundle, batch, result)):
            if row not in failed:
                line = answer.row() if lines is None else {"image": answer.image, **lines[row]}
                self._file.write(line)
                self.tally.add(answer)
                if self._seen is not None:
                    self._seen(answer)
                written.append(line)
        return written


@contextlib.contextmanager
def kept(output: Path | None) -> Iterator[AnswersFile]:
    """Open a file for answers; an error or a signal within says how many of them it keeps."""
    with AnswersFile(output) as file:
        try:
            yield file
        except BaseException as error:
            stopped = stopped_by(error)
            if output is not None:
                (error if stopped is None else stopped).add_note(file.told())
            if stopped is None or stopped is error:
                raise
            raise stopped from error


@contextlib.contextmanager
def shown(tally: Tally, title: str) -> Iterator[None]:
    """Print the answers so far where an error or a signal stops what runs within: a camera has no other end."""
    try:
        yield
    except BaseException:
        if tally.count:
            with contextlib.suppress(OSError):  # nobody reads it; what stops the run says so
                print_answers(f"{tally.count} images through {title}, until it was stopped", tally)
        raise


def answers_of(bundle: Bundle, batch: Batch, result: Result) -> Iterator[Answer]:
    """Put what came out of a batch beside what is known of its images."""
    (logits,) = result.outputs.values()
    confidences, indices = (values.tolist() for values in logits.softmax(1).max(1))
    exits, lengths = [] if result.exits is None else result.exits.tolist(), result.payload_bytes
    for i, name in enumerate(batch.names):
        yield Answer(
            image=name,
            prediction=bundle.class_names[indices[i]],
            label=batch.labels[i],
            confidence=confidences[i],
            payload_bytes=lengths[i],
            file_bytes=batch.file_bytes[i],
            exit=None if not exits or exits[i] < 0 else bundle.manifest.exits[exits[i]].name,
        )
