"""Folders of images, sorted by split and class."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cleave.deployment import ImageInput

from .arguments import check_classes, picked_classes
from .base import ImageDataModule
from .sources import FileSource, ImageSource, check_fraction, check_val_from, split_off
from .splits import SPLITS, log_once

MEANT_AS_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
WHOLE = "whole"
"""What stands for the splits of a folder that has none."""

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(ImageDataModule):
    """Images under ``root/train/<class>/…``, ``root/val/<class>/…`` and ``root/test/<class>/…``.

    Classes are the sorted folder names of ``train/`` and must be the same in every split. Files and folders whose
    name starts with a dot or that have none of ``EXTENSIONS`` are ignored; folders inside a class are searched too. A
    log line tells where a split comes from that has no folder:

    - without ``val/``, a fixed stratified part of ``train/`` is split off;
    - without ``test/``, the validation images are tested on, which flatters a model that was selected on them;
    - where ``root`` holds the class folders themselves, fixed stratified parts are split off for test and validation;
    - where it holds ``val/`` or ``test/`` alone, these can be evaluated on, and there is nothing to train on.

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
        check_val_from(val_from)
        check_fraction(val_fraction)
        check_classes(classes)
        super().__init__(augment=augment, **options)
        self.root = root
        self.classes = None if classes is None else list(classes)
        self.val_from = val_from
        self.val_fraction = val_fraction

    @functools.cached_property
    def _tree(self) -> tuple[list[str], dict[str, FileSource]]:
        return scan(self.root, self.classes)

    @property
    def class_names(self) -> list[str]:
        """The sorted names of the class folders."""
        return list(self._tree[0])

    @functools.cached_property
    def native_input(self) -> ImageInput:
        """The images' own size if they share one, else 224 pixels cut from 256; grey if all of them are.

        At most 256 training images at even distances are looked at. Mean and standard deviation are ImageNet's, or 0.5
        for grey.
        """
        source = self.split("train" if {"train", WHOLE} & self._tree[1].keys() else "test")
        shapes = [source.shape(int(index)) for index in source.spaced(256)]
        size: dict[str, Any] = {"height": 224, "width": 224, "resize": 256}
        if len({shape[:2] for shape in shapes}) == 1:
            size = {"height": shapes[0][0], "width": shapes[0][1]}
        if all(channels == 1 for *_, channels in shapes):
            return ImageInput(**size, color_mode="L", mean=(0.5,), std=(0.5,))
        return ImageInput(**size)

    def load_splits(self) -> dict[str, ImageSource]:
        """Find the images, and split off what has no folder of its own."""
        splits: dict[str, ImageSource] = dict(self._tree[1])
        if WHOLE in splits:
            rest, splits["test"] = split_off(splits.pop(WHOLE), self.val_fraction, self.class_names)
            splits["train"] = rest
            log_once(f"{self.root} has no train/: {len(splits['test'])} of its images are split off for the test")
        if "train" not in splits:
            log_once(f"{self.root} has no train/: it can be evaluated on, not trained on")
            alone = next(iter(splits.values()))
            return {"val": alone, "test": alone} | splits
        if self.val_from == "test":
            if "test" not in splits:
                raise ValueError(f"val_from='test' takes one half of {Path(self.root, 'test')}, which does not exist")
            splits["test"], splits["val"] = split_off(splits["test"], 0.5, self.class_names)
            log_once(
                f"{self.root}: one fixed half of test/ validates ({len(splits['val'])} images), the other half tests"
            )
        elif "val" not in splits:
            splits["train"], splits["val"] = split_off(splits["train"], self.val_fraction, self.class_names)
            log_once(f"{self.root} has no val/: {len(splits['val'])} images of train/ are split off for validation")
        if "test" not in splits:
            splits["test"] = splits["val"]
            log_once(
                f"{self.root} has no test/: it tests on the validation images, which flatters a model selected on them"
            )
        return splits


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
