"""Handwritten digits that come with Cleave: real images, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cleave.deployment import ImageInput

from ..base import ImageDataModule
from ..sources import ArraySource, ImageSource, split_off

FILE = Path(__file__).with_name("digits.npz")


class Digits(ImageDataModule):
    """The 1,797 handwritten digits of 8x8 grey pixels of the UCI test set (Alpaydin and Kaynak 1998, CC BY 4.0).

    They are those of scikit-learn's ``load_digits``, in its order.

    The split is fixed and stratified: 1,259 images to train, 179 to validate and 359 to test. The original values 0 to
    16 are scaled to 0 to 255.

    Args:
        augment: A preset as in :class:`ImageDataModule`; ``crop`` shifts by up to one pixel. Mirrored digits are no
            digits, so a preset that flips is for experiments only.
        **options: As in :class:`ImageDataModule`.
    """

    def __init__(self, *, augment: str = "crop", **options: Any) -> None:
        super().__init__(augment=augment, **options)

    @property
    def class_names(self) -> list[str]:
        """``"0"`` to ``"9"``."""
        return [str(digit) for digit in range(10)]

    @property
    def native_input(self) -> ImageInput:
        """8x8 grey, with the training images' own mean and standard deviation."""
        return ImageInput(height=8, width=8, color_mode="L", mean=(0.305,), std=(0.376,))

    def load_splits(self) -> dict[str, ImageSource]:
        """Read the images from the file beside this one."""
        with np.load(FILE, allow_pickle=False) as digits:
            pixels, labels = np.rint(digits["images"] * (255 / 16)).astype(np.uint8), digits["labels"].astype(np.int64)
        every = ArraySource(pixels, labels, "digits")
        rest, test = split_off(every, 0.2, self.class_names)
        train, val = split_off(rest, 0.125, self.class_names)
        return {"train": train, "val": val, "test": test}
