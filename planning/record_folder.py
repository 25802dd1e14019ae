"""A folder of records, one file for each, that goes on where it stopped and knows what it is of."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

from cleave.deployment.bundle.canonical_json import dump, parse

SCHEMA = 1


class RecordFolder:
    """A folder with a file that says what it is of, and a file for each record.

    Args:
        folder: The folder; it is made where there is none.
        identity: Everything that a record depends on, as JSON values.

    Attributes:
        whose: What has such a folder, in a word.
        identity_file: The file that says what it is of.
        records_folder: Where records lie in it, and what they are of.

    Raises:
        ValueError: The folder is of something else, or not such a folder at all.
    """

    whose: ClassVar[str]
    identity_file: ClassVar[str]
    records_folder: ClassVar[str]

    def __init__(self, folder: pathlib.Path | str, identity: Mapping[str, Any]) -> None:
        self.folder = pathlib.Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"folder={self.folder} is a file; give a folder, a new one or that of an earlier {self.whose}"
            )
        own = parse(dump({"schema": SCHEMA, **identity}))
        file = self.folder / self.identity_file
        if file.exists():
            self._check(file, own)
        elif self.folder.exists() and any(self.folder.glob(f"{self.records_folder}/*.json")):
            raise ValueError(
                f"{self.folder} holds records of {self.records_folder}, but no {self.identity_file} that says of what; "
                "take another"
            )
        (self.folder / self.records_folder).mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_whole(file, dump(own))

    def files(self) -> list[pathlib.Path]:
        """Return the files of all records, by name."""
        return sorted((self.folder / self.records_folder).glob("*.json"))

    def record_file(self, name: str) -> pathlib.Path:
        """Return the file of a record by its name."""
        return self.folder / self.records_folder / f"{name}.json"

    def _check(self, file: pathlib.Path, own: dict[str, Any]) -> None:
        try:
            there = parse(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}; take another folder") from error
        there, here = _flat(there), _flat(own)
        if other := [name for name in {**here, **there} if there.get(name, _NONE) != here.get(name, _NONE)]:
            values = " and ".join(_said(values.get(other[0], _NONE)) for values in (there, here))
            raise ValueError(
                f"{self.folder} is another {self.whose}'s: {', '.join(other)} differ"
                f"{'s' if len(other) == 1 else ''}; {other[0]} there and here: {values}. Take another folder, or the "
                "same networks, data and settings"
            )


def write_whole(file: pathlib.Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    half = file.with_suffix(".half")
    half.write_bytes(content)
    half.replace(file)


_NONE = object()


def _said(value: Any) -> str:
    return "none" if value is _NONE else f"{value!r:.200}"


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested values by their names with dots."""
    if not isinstance(values, dict) or not values:
        return {name: values}
    return {
        key: leaf for own, value in values.items() for key, leaf in _flat(value, f"{name}.{own}".strip(".")).items()
    }
