"""CIFAR-10 in its original pixels, by torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from cleave.deployment import ImageInput

from ..base import ImageDataModule
from ..sources import ArraySource, ImageSource, check_fraction, check_val_from, split_off
from ..splits import log_once

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 RGB pixels in ten classes (Krizhevsky 2009).

    Validation images are a fixed, stratified part of the training or of the test images, whatever the ``seed``.

    Args:
        root: Folder that holds or shall hold ``cifar-10-batches-py``.
        download: Fetch the data set if ``root`` lacks it; torchvision checks its digests.
        val_from: ``"train"`` takes ``val_fraction`` of the training images. ``"test"`` makes one fixed half of the test
            images the validation split and the other half the test split: for weights trained on all of ``train``.
        val_fraction: Share of the training images with ``val_from="train"``.
        augment: A preset as in :class:`ImageDataModule`.
        **options: As in :class:`ImageDataModule`.

    Raises:
        ValueError: The data set is missing or corrupt and was not, or cannot be, downloaded.
    """

    def __init__(
        self,
        root: str | Path = "data",
        *,
        download: bool = True,
        val_from: str = "train",
        val_fraction: float = 0.1,
        augment: str = "crop_flip",
        **options: Any,
    ) -> None:
        root = str(root)
        check_val_from(val_from)
        check_fraction(val_fraction)
        super().__init__(augment=augment, **options)
        self.root = root
        self.download = download
        self.val_from = val_from
        self.val_fraction = val_fraction

    @property
    def class_names(self) -> list[str]:
        """``"airplane"`` to ``"truck"``."""
        return list(CLASSES)

    @property
    def native_input(self) -> ImageInput:
        """32x32 RGB with the training images' own mean and standard deviation."""
        return ImageInput(height=32, width=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))

    def prepare_data(self) -> None:
        """Download the data set if it is missing.

        Raises:
            ValueError: It cannot be downloaded.
        """
        if not self.download:
            return
        try:
            datasets.CIFAR10(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"cannot download CIFAR-10 to root={self.root!r}: {error}; without a network, put the archive "
                f"{datasets.CIFAR10.filename} there yourself ({datasets.CIFAR10.url})"
            ) from error

    def load_splits(self) -> dict[str, ImageSource]:
        """Read the data set and split off the validation images.

        Raises:
            ValueError: It is missing or corrupt.
        """
        train, test = self._source(train=True), self._source(train=False)
        if self.val_from == "train":
            train, val = split_off(train, self.val_fraction, self.class_names)
        else:
            test, val = split_off(test, 0.5, self.class_names)
        log_once(
            f"CIFAR-10: {len(train)} training, {len(val)} validation (from {self.val_from}), {len(test)} test images"
        )
        return {"train": train, "val": val, "test": test}

    def _source(self, train: bool) -> ImageSource:
        try:
            data = datasets.CIFAR10(self.root, train=train)
        except RuntimeError as error:
            raise ValueError(
                f"CIFAR-10 is missing or corrupt in root={self.root!r}: {error}; call prepare_data() with "
                "download=True, or give the folder that holds cifar-10-batches-py"
            ) from error
        return ArraySource(np.asarray(data.data), data.targets, f"CIFAR-10 {'train' if train else 'test'}")
