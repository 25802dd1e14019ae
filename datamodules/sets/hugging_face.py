"""Image data sets of the Hugging Face hub, or of its kind on disk, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..sources import ImageSource
from .completing import WHOLE, FoundImages
from .torchvision_images import SPLIT_NAMES, dataset_sources


class HuggingFaceImages(FoundImages):
    """The pictures and labels of a data set that the library ``datasets`` reads (the extra ``hf``).

    It gives what it has of ``train``, ``val`` (or ``valid``, ``validation``) and ``test``; other splits are left aside.
    What is missing is split off as :class:`~cleave.datamodules.sets.completing.FoundImages` says.

    Args:
        path: The name on the hub, such as ``uoft-cs/cifar10``, or a folder: one that ``save_to_disk`` wrote, or any
            that ``datasets.load_dataset`` reads.
        name: Which configuration of the data set; ``None``: its only one.
        image_column: The column of pictures.
        label_column: The column of labels: classes, whole numbers or texts.
        load: Further arguments of ``datasets.load_dataset``, such as ``revision`` or ``data_files``.
        classes: The classes to take, of those that there are; ``None``: all.
        val_from: ``"test"`` makes one half of the test images the validation split.
        val_fraction: Share of every class that is split off where a split is missing.
        augment: A preset as in :class:`ImageDataModule`.
        **options: As in :class:`ImageDataModule`.

    Raises:
        ValueError: From the first use of the data on, and before any training: ``datasets`` is not installed, the data
            set cannot be read, or it lacks a column or labels.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        load: Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        val_from: str = "train",
        val_fraction: float = 0.1,
        augment: str = "imagenet",
        **options: Any,
    ) -> None:
        path, load = str(path), dict(load or {})
        super().__init__(classes=classes, val_from=val_from, val_fraction=val_fraction, augment=augment, **options)
        self.path, self.name, self.load = path, name, load
        self.image_column, self.label_column = image_column, label_column

    def find(self) -> tuple[list[str], dict[str, ImageSource], str]:
        """Read the data set."""
        found = self._read()
        if not isinstance(found, Mapping):
            found = {WHOLE: found}
        else:
            places = {split: [name for name in names if name in found] for split, names in SPLIT_NAMES.items()}
            known = {split: found[names[0]] for split, names in places.items() if names}
            found = known or ({WHOLE: next(iter(found.values()))} if len(found) == 1 else {})
            if not found:
                raise ValueError(f"the data set {self.path} has no split called train, val or test")
        classes = self._class_names(found)
        rows = {split: Rows(each, self.image_column, self.label_column, classes) for split, each in found.items()}
        return (*dataset_sources(rows, self.classes, self.path), self.path)

    def _read(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "data of Hugging Face needs the package datasets; install the extra: pip install 'cleave[hf]'"
            ) from error
        written = any(Path(self.path, file).is_file() for file in ("dataset_dict.json", "state.json"))
        try:
            if written:
                return datasets.load_from_disk(self.path)
            return datasets.load_dataset(self.path, self.name, **self.load)
        except Exception as error:  # hubs raise errors of many libraries
            raise ValueError(f"the data set path={self.path!r} name={self.name!r} cannot be read: {error}") from error

    def _class_names(self, found: Mapping[str, Any]) -> list[str]:
        """Return the names of the classes in the order of their indices."""
        for split, each in found.items():
            for what in ("image", "label"):
                if (column := getattr(self, f"{what}_column")) not in each.column_names:
                    known = list(each.column_names)
                    raise ValueError(f"{self.path} {split} has no column {column!r} but {known}; give {what}_column=…")
        names = getattr(next(iter(found.values())).features[self.label_column], "names", None)
        if names:
            return [str(name) for name in names]
        values = {value for each in found.values() for value in each[self.label_column]}
        if None in values or not all(isinstance(value, int | str) for value in values):
            raise ValueError(f"{self.path}: the column {self.label_column!r} holds no classes, whole numbers or texts")
        return [str(value) for value in sorted(values, key=lambda value: (isinstance(value, str), value))]


class Rows:
    """A split as (picture, class index), read row by row.

    Args:
        split: The ``datasets.Dataset``.
        image_column: Its column of pictures.
        label_column: Its column of labels.
        classes: The names of the classes.

    Attributes:
        targets: The class index of every row.
        classes: The names of the classes.
    """

    def __init__(self, split: Any, image_column: str, label_column: str, classes: Sequence[str]) -> None:
        self.split, self.image_column, self.classes = split, image_column, list(classes)
        numbered = hasattr(split.features[label_column], "names")
        index = {name: number for number, name in enumerate(classes)}
        self.targets = [value if numbered else index[str(value)] for value in split[label_column]]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.split[row][self.image_column], self.targets[row]
