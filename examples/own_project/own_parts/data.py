"""A data set: where the pictures are, what they are called, and what input suits them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cleave.datamodules import ImageDataModule
from cleave.datamodules.sources import ArraySource, ImageSource
from cleave.deployment import ImageInput

SIDE = 16


class Stripes(ImageDataModule):
    """Drawn pictures of stripes: lying, standing and slanting, in noise.

    Args:
        count: Pictures in each of ``train``, ``val`` and ``test``.
        **options: As of every data module.
    """

    def __init__(self, *, count: int = 300, **options: Any) -> None:
        super().__init__(**options)
        self.count = count

    @property
    def class_names(self) -> list[str]:
        """The directions of the stripes."""
        return ["lying", "standing", "slanting"]

    @property
    def native_input(self) -> ImageInput:
        """Grey pictures of 16 by 16 pixels."""
        return ImageInput(height=SIDE, width=SIDE, color_mode="L", mean=(0.5,), std=(0.25,))

    def load_splits(self) -> dict[str, ImageSource]:
        """Draw the pictures."""
        return {
            split: ArraySource(*draw(self.count, seed), split) for seed, split in enumerate(("train", "val", "test"))
        }


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw uint8 pictures (count, 16, 16) and their labels (count,)."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    row, column = np.mgrid[:SIDE, :SIDE]
    along = np.stack([row, column, (row + column) / np.sqrt(2)])[labels]
    waves = np.sin(1.6 * along + random.uniform(0, 2 * np.pi, (count, 1, 1)))
    return (127.5 + 60 * waves + random.normal(0, 25, waves.shape)).clip(0, 255).astype(np.uint8), labels
