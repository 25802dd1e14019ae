"""A data set whose splits may be incomplete: what is missing is split off, the same way everywhere."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from cleave.deployment import ImageInput

from ..arguments import check_classes
from ..base import ImageDataModule
from ..sources import ImageSource, check_fraction, check_val_from, split_off
from ..splits import log_once

WHOLE = "whole"
"""What stands for the splits of a data set that has none."""


class FoundImages(ImageDataModule):
    """Images of any size, in the splits that there are; a log line tells where another one comes from.

    - without ``val``, a fixed stratified part of ``train`` is split off;
    - without ``test``, the validation images are tested on, which flatters a model that was selected on them;
    - without any split, fixed stratified parts are split off for test and validation;
    - without ``train``, the others can be evaluated on, and there is nothing to train on.

    A subclass gives :meth:`find`.

    Args:
        classes: The classes to take, of those that there are; ``None``: all.
        val_from: ``"test"`` makes one fixed half of ``test`` the validation split and the other half the test split,
            and leaves ``val`` alone: for weights trained on all of ``train``.
        val_fraction: Share of every class that is split off where a split is missing.
        augment: A preset as in :class:`ImageDataModule`.
        **options: As in :class:`ImageDataModule`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        classes: Sequence[str] | None = None,
        val_from: str = "train",
        val_fraction: float = 0.1,
        augment: str = "imagenet",
        **options: Any,
    ) -> None:
        check_val_from(val_from)
        check_fraction(val_fraction)
        check_classes(classes)
        super().__init__(augment=augment, **options)
        self.classes = None if classes is None else list(classes)
        self.val_from = val_from
        self.val_fraction = val_fraction

    @abstractmethod
    def find(self) -> tuple[list[str], dict[str, ImageSource], str]:
        """Find the images; called once.

        Returns:
            The names of the classes; the images by split, or under :data:`WHOLE` alone; and what messages call the
            place.
        """

    @functools.cached_property
    def _all(self) -> tuple[list[str], dict[str, ImageSource], str]:
        return self.find()

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in the order of the labels."""
        return list(self._all[0])

    @functools.cached_property
    def native_input(self) -> ImageInput:
        """The images' own size if they share one, else 224 pixels cut from 256; grey if all of them are.

        At most 256 training images at even distances are looked at. Mean and standard deviation are ImageNet's, or 0.5
        for grey.
        """
        source = self.split("train" if {"train", WHOLE} & self._all[1].keys() else "test")
        shapes = [source.shape(int(index)) for index in source.spaced(256)]
        size: dict[str, Any] = {"height": 224, "width": 224, "resize": 256}
        if len({shape[:2] for shape in shapes}) == 1:
            size = {"height": shapes[0][0], "width": shapes[0][1]}
        if all(channels == 1 for *_, channels in shapes):
            return ImageInput(**size, color_mode="L", mean=(0.5,), std=(0.5,))
        return ImageInput(**size)

    def load_splits(self) -> dict[str, ImageSource]:
        """Find the images, and split off what is missing."""
        names, found, place = self._all
        splits = dict(found)
        if WHOLE in splits:
            splits["train"], splits["test"] = split_off(splits.pop(WHOLE), self.val_fraction, names)
            log_once(f"{place} has no splits: {len(splits['test'])} of its images are split off for the test")
        if "train" not in splits:
            log_once(f"{place} has no train/: it can be evaluated on, not trained on")
            alone = next(iter(splits.values()))
            return {"val": alone, "test": alone} | splits
        if self.val_from == "test":
            if "test" not in splits:
                raise ValueError(f"val_from='test' takes one half of {place}/test, which does not exist")
            splits["test"], splits["val"] = split_off(splits["test"], 0.5, names)
            log_once(f"{place}: one fixed half of test/ validates ({len(splits['val'])} images), the other half tests")
        elif "val" not in splits:
            splits["train"], splits["val"] = split_off(splits["train"], self.val_fraction, names)
            log_once(f"{place} has no val/: {len(splits['val'])} images of train/ are split off for validation")
        if "test" not in splits:
            splits["test"] = splits["val"]
            log_once(
                f"{place} has no test/: it tests on the validation images, which flatters a model selected on them"
            )
        return splits
