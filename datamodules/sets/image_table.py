"""Images that a table lists: a CSV file of paths and labels."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import picked_classes
from ..sources import FileSource, ImageSource
from ..splits import SPLITS
from .completing import WHOLE, FoundImages


class ImageTable(FoundImages):
    """Images listed in a CSV file, one a line, with their labels and maybe their splits.

    The first line names the columns. Classes are the sorted labels. Without a column of splits all images are divided
    as :class:`~cleave.datamodules.sets.completing.FoundImages` says.

    Args:
        table: The CSV file, in UTF-8.
        root: Folder that relative paths start from; ``None``: that of the table.
        path_column: The column of paths.
        label_column: The column of labels, any words or numbers.
        split_column: The column with ``train``, ``val`` or ``test``; without one of that name there are no splits.
        classes: The labels to take, of those that there are; ``None``: all.
        val_from: ``"test"`` makes one half of the test images the validation split.
        val_fraction: Share of every class that is split off where a split is missing.
        augment: A preset as in :class:`ImageDataModule`.
        **options: As in :class:`ImageDataModule`.

    Raises:
        ValueError: From the first use of the data on, and before any training: the table cannot be read, lacks a column
            or a value, names a split that is none, an image that is not there, or fewer than two classes.
    """

    def __init__(
        self,
        table: str | Path,
        *,
        root: str | Path | None = None,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str = "split",
        classes: Sequence[str] | None = None,
        val_from: str = "train",
        val_fraction: float = 0.1,
        augment: str = "imagenet",
        **options: Any,
    ) -> None:
        table, root = str(table), None if root is None else str(root)
        super().__init__(classes=classes, val_from=val_from, val_fraction=val_fraction, augment=augment, **options)
        self.table, self.root = table, root
        self.columns = {"path": path_column, "label": label_column, "split": split_column}

    def find(self) -> tuple[list[str], dict[str, ImageSource], str]:
        """Read the table."""
        rows = self._rows()
        known = sorted({row["label"] for row in rows})
        if len(known) < 2:
            raise ValueError(f"{self.table} has the labels {known} alone; a classifier needs at least two")
        names = picked_classes(known, self.classes, self.table)
        root = Path(self.table).parent if self.root is None else Path(self.root)
        taken = [row for row in rows if row["label"] in names]
        if gone := [row["path"] for row in taken if not (root / row["path"]).is_file()]:
            raise ValueError(f"{self.table} lists {len(gone)} image(s) that {root} lacks, the first is {gone[0]!r}")
        sources = {}
        for split in dict.fromkeys(row["split"] for row in taken):
            own = [row for row in taken if row["split"] == split]
            if empty := sorted(set(names) - {row["label"] for row in own}):
                raise ValueError(f"{self.table} has no {split} image of {empty}")
            sources[split] = FileSource(root, [row["path"] for row in own], [names.index(row["label"]) for row in own])
        return names, {split: sources[split] for split in (*SPLITS, WHOLE) if split in sources}, self.table

    def _rows(self) -> list[dict[str, str]]:
        try:
            with Path(self.table).open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                header, lines = list(reader.fieldnames or ()), list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"cannot read the table {self.table!r}: {error}") from error
        for what in ("path", "label"):
            if (column := self.columns[what]) not in header:
                near = difflib.get_close_matches(column, header, n=1)
                hint = f"; give {what}_column={near[0] if near else '…'}"
                raise ValueError(f"{self.table} has no column {column!r} but {header}{hint}")
        divided = self.columns["split"] in header
        rows = []
        for number, line in enumerate(lines, start=2):
            row = {what: (line.get(column) or "").strip() for what, column in self.columns.items()}
            row["split"] = row["split"] if divided else WHOLE
            if not row["path"] or not row["label"]:
                raise ValueError(f"line {number} of {self.table} lacks a path or a label")
            if row["split"] not in (*SPLITS, WHOLE) or (divided and row["split"] == WHOLE):
                raise ValueError(
                    f"line {number} of {self.table} has the split {row['split']!r}; known are {list(SPLITS)}"
                )
            rows.append(row)
        return rows
