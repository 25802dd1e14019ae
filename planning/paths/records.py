"""The folder of a search: what it searches, and one record for each path that was trained, so that it can go on."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from cleave.architectures.linking.path import Path
from cleave.deployment.bundle.canonical_json import dump, parse
from cleave.planning.paths.rewards import check_fraction
from cleave.planning.record_folder import RecordFolder, write_whole


@dataclasses.dataclass(frozen=True)
class PathRecord:
    """What is kept of a trained path.

    Attributes:
        path: The path.
        accuracy: What it reached, a fraction.
        details: What else was measured, as JSON values: seconds of training, the checkpoint, MACs.
    """

    path: Path
    accuracy: float
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def path_name(path: Path) -> str:
    """Return a path as a name of files.

    Example:
        >>> path_name(Path(0, 1, 4, 5)), path_name(Path(0, None, None, 5))
        ('0-1-4-5', '0-x-x-5')
    """
    return "-".join("x" if block is None else str(block) for block in path)


class SearchFolder(RecordFolder):
    """A folder with ``search.json``, which says what is searched, and ``paths/0-1-4-5.json`` for each trained path.

    Args:
        folder: The folder; it is made where there is none.
        identity: Everything that an accuracy depends on, as JSON values: digests of both networks and of the data, and
            the settings of links and training.

    Raises:
        ValueError: The folder is another search's, or not one at all.
    """

    whose, identity_file, records_folder = "search", "search.json", "paths"

    def records(self) -> list[PathRecord]:
        """Return the records there are, by path.

        Raises:
            ValueError: A record is damaged.
        """
        return [_read(file) for file in self.files()]

    def find(self, path: Path) -> PathRecord | None:
        """Return the record of a path, if there is one.

        Raises:
            ValueError: It is damaged.
        """
        file = self.file(path)
        return _read(file) if file.exists() else None

    def write(self, record: PathRecord) -> None:
        """Keep a record; one that is half written never takes its place.

        Raises:
            ValueError: Its accuracy is no fraction, or its details are no JSON values.
        """
        accuracy = check_fraction(f"what training the path {record.path} gave", record.accuracy)
        content = {**record.path._asdict(), "accuracy": accuracy, "details": dict(record.details)}
        write_whole(self.file(record.path), dump(content))

    def file(self, path: Path) -> pathlib.Path:
        """Return the file of a path's record."""
        return self.record_file(path_name(path))

    def recorded(self, train: Callable[[Path], PathRecord]) -> Callable[[Path], float]:
        """Wrap training for a search: a path that has a record is not trained again.

        Since a search asks the same of the same answers, it goes on behind the last record when it is run again.

        Args:
            train: Trains a path.
        """

        def known(path: Path) -> float:
            record = self.find(path)
            if record is None:
                record = train(path)
                self.write(record)
            return record.accuracy

        return known


def _read(file: pathlib.Path) -> PathRecord:
    try:
        values = parse(file.read_bytes())
        if not isinstance(values, dict) or set(values) != {*Path._fields, "accuracy", "details"}:
            raise ValueError("it must hold lout, hin, hout, lin, accuracy and details")
        blocks = [values[name] for name in Path._fields]
        if any(not isinstance(block, int | None) or isinstance(block, bool) for block in blocks):
            raise ValueError(f"its blocks must be whole numbers, got {blocks}")
        if file.stem != path_name(Path(*blocks)):
            raise ValueError(f"it is of the path {Path(*blocks)}")
        if not isinstance(values["details"], dict):
            raise ValueError("its details must be an object")
        return PathRecord(Path(*blocks), check_fraction("its accuracy", values["accuracy"]), values["details"])
    except ValueError as error:
        raise ValueError(f"the record {file} is damaged: {error}; delete it, and the path is trained again") from error
