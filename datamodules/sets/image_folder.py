"""Folders of images, sorted by split and class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import picked_classes
from ..sources import FileSource, ImageSource
from ..splits import SPLITS
from .completing import WHOLE, FoundImages

MEANT_AS_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(FoundImages):
    """Images under ``root/train/<class>/…``, ``root/val/<class>/…`` and ``root/test/<class>/…``, or ``root/<class>/…``.

    Classes are the sorted folder names of ``train/`` and must be the same in every split. Files and folders whose
    name starts with a dot or that have none of ``EXTENSIONS`` are ignored; folders inside a class are searched too.
    What becomes of splits that have no folder, :class:`~cleave.datamodules.sets.completing.FoundImages` says.

    Args:
        root: The folder.
        classes: The classes to take, of those that there are; ``None``: all.
        val_from: ``"test"`` makes one fixed half of ``test/`` the validation split and the other half the test split,
            and leaves ``val/`` alone: for weights trained on all of ``train/``.
        val_fraction: Share of every class that is split off where a split has no folder.
        augment: A preset as in :class:`ImageDataModule`.
        **options: As in :class:`ImageDataModule`.

    Raises:
        ValueError: From the first use of the data on, and before any training: the folder or the images are missing,
            there are fewer than two classes, a class is empty or unknown, or the splits differ in their classes.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        classes: Sequence[str] | None = None,
        val_from: str = "train",
        val_fraction: float = 0.1,
        augment: str = "imagenet",
        **options: Any,
    ) -> None:
        root = str(root)
        super().__init__(classes=classes, val_from=val_from, val_fraction=val_fraction, augment=augment, **options)
        self.root = root

    def find(self) -> tuple[list[str], dict[str, ImageSource], str]:
        """Find the classes and the images of every split's folder."""
        names, sources = scan(self.root, self.classes)
        return names, dict(sources), self.root


def scan(root: str | Path, classes: Sequence[str] | None = None) -> tuple[list[str], dict[str, FileSource]]:
    """Find the classes, and the images of every split folder, under ``root``.

    Returns:
        The names of the classes, and the images by split; under :data:`WHOLE` where there are no split folders.

    Raises:
        ValueError: As of :class:`ImageFolder`.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r} is no folder; give one that holds train/<class>/<images>")
    splits = {split: root / split for split in SPLITS if (root / split).is_dir()} or {WHOLE: root}
    there = sorted(entry.name for entry in root.iterdir())[:10]
    if WHOLE in splits and not _holds_classes(root):
        raise ValueError(f"{root} has no train/ folder (it holds {there}); images belong into train/<class>/")
    first = next(iter(splits.values()))
    known = class_folders(first)
    for folder in splits.values():
        if missing := sorted(set(known) ^ set(class_folders(folder))):
            raise ValueError(f"{folder} and {first} must have the same classes; only one of them has {missing}")
    names = picked_classes(known, classes, str(first))
    return names, {split: _images(folder, names) for split, folder in splits.items()}


def _holds_classes(root: Path) -> bool:
    """Whether a folder without split folders holds those of classes, and none that was meant to be a split."""
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return len(names) > 1 and not any(name.lower() in MEANT_AS_SPLITS for name in names)


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the class folders in a split's folder.

    Raises:
        ValueError: There are fewer than two.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} is empty of class folders; images belong into {folder}/<class>/")
    if len(names) == 1:
        raise ValueError(f"{folder} has one class alone, {names[0]!r}; a classifier needs at least two")
    return names


def _images(folder: Path, names: Sequence[str]) -> FileSource:
    paths: list[str] = []
    labels: list[int] = []
    walked: dict[str, str] = {}
    for label, name in enumerate(names):
        before = len(paths)
        for directory, subfolders, files in os.walk(folder / name, followlinks=True):
            _check_walked(folder, directory, walked)
            subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
            relative = Path(directory).relative_to(folder)
            images = sorted(f for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith("."))
            paths.extend(str(relative / image) for image in images)
        if len(paths) == before:
            raise ValueError(f"the class folder {folder / name} has no images (known are {', '.join(EXTENSIONS)})")
        labels.extend([label] * (len(paths) - before))
    _check_names(folder, paths)
    return FileSource(folder, paths, labels)


def _check_walked(folder: Path, directory: str, walked: dict[str, str]) -> None:
    """Refuse a folder that a link leads to again: its images would count twice, and under another class."""
    real = os.path.realpath(directory)
    above = os.path.realpath(folder)
    if real == above or above.startswith(real.rstrip(os.sep) + os.sep):
        raise ValueError(f"the link {directory} leads to {real}, which holds {folder} itself; remove it")
    if (before := walked.setdefault(real, directory)) != directory:
        raise ValueError(
            f"{directory} and {before} are the same folder, {real}: its images would count twice; remove the link"
        )


def _check_names(folder: Path, paths: Sequence[str]) -> None:
    """Refuse names that no report, log or checkpoint could hold."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(path).decode(errors="backslashreplace")
            raise ValueError(f"the name of {folder}/{shown} is not UTF-8; rename the file or folder") from None
