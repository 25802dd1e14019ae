"""A split as the loader sees it: pictures preprocessed or augmented into uint8 batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cleave.deployment import ImageInput

from .augment import Augmentation
from .cache import AUTO_CACHE_BYTES, PixelCache, in_threads
from .feature_cache import FeatureCache
from .sampling import Key, sample_seeds
from .sources import CorruptImageError, ImageSource

Batch = tuple[Tensor, Tensor]
CachedBatch = tuple[Tensor | None, Tensor, dict[str, Tensor]]


class ImageDataset(Dataset[Batch | CachedBatch]):
    """Yields uint8 images with their labels, by index or, augmented, by (epoch, index).

    What is cached is what is the same in every epoch: the preprocessed image where the augmentation starts from it,
    otherwise (random resized crops) the decoded original picture.

    Args:
        source: The pictures.
        spec: How a picture becomes the network's input.
        augmentation: Augmentation of the images, or ``None`` for evaluation.
        seed: With (epoch, index) it fixes the augmentation.
        cache: ``True``, ``False``, or ``"auto"``: if the decoded pictures take at most ``AUTO_CACHE_BYTES``.

    Attributes:
        features: Features of frozen parts that batches bring along, or ``None``. Augmentation is then drawn for
            (epoch modulo its views, index), which are the images that they were computed of.
        with_images: Whether batches with features hold images as well.

    Raises:
        CorruptImageError: A picture cannot be decoded; without a cache it is raised when the picture is first read.
    """

    def __init__(
        self,
        source: ImageSource,
        spec: ImageInput,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        cache: bool | str = "auto",
    ) -> None:
        self.source = source
        self.spec = spec
        self.augmentation = augmentation
        self.seed = seed
        self.features: FeatureCache | None = None
        self.with_images = True
        self._takes_pictures = augmentation is not None and augmentation.takes_pictures
        self.cache: PixelCache | None = None
        if cache is True or (cache == "auto" and self._decoded_bytes() <= AUTO_CACHE_BYTES):
            self.cache = self._decode_all()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | Key) -> Batch:
        """Return one uint8 image (C, H, W) and its label, a scalar int64 tensor."""
        images, labels = self.batch([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch | CachedBatch:
        """Return a whole batch: of :meth:`batch`, with :attr:`features` of :meth:`cached_batch`."""
        return self.batch(keys) if self.features is None else self.cached_batch(self.features, keys)

    def batch(self, keys: Sequence[int | Key]) -> Batch:
        """Return uint8 images (B, C, H, W) and int64 labels (B,). A bare index stands for epoch 0."""
        pairs = self._pairs(keys)
        indices = np.array([index for _, index in pairs], dtype=np.int64)
        labels = torch.from_numpy(self.source.labels[indices])
        if self.augmentation is None:
            return torch.from_numpy(self._inputs(indices)), labels
        seeds = sample_seeds(self.seed, pairs)
        images = self._pictures(indices) if self.augmentation.takes_pictures else self._inputs(indices)
        return self.augmentation(images, seeds), labels

    def cached_batch(self, features: FeatureCache, keys: Sequence[int | Key]) -> CachedBatch:
        """Return images or ``None``, labels, and every feature (B, ...) by name as stored."""
        rows = np.array([view * len(self) + index for view, index in self._pairs(keys)], dtype=np.int64)
        if self.with_images:
            return *self.batch(keys), features.batch(rows)
        return None, torch.from_numpy(self.source.labels[rows % len(self)]), features.batch(rows)

    def _pairs(self, keys: Sequence[int | Key]) -> list[Key]:
        pairs = [(0, key) if isinstance(key, int) else key for key in keys]
        if self.features is None:
            return pairs
        return [(epoch % self.features.views, index) for epoch, index in pairs]

    def without_augmentation(self) -> ImageDataset:
        """Return the same images as evaluation sees them, sharing what is decoded."""
        plain = copy.copy(self)
        plain.augmentation = None
        plain.features = None
        return plain

    def _inputs(self, indices: np.ndarray) -> np.ndarray:
        if self.cache is not None and not self._takes_pictures:
            return self.cache.batch(indices)
        if self.cache is not None:
            return np.stack([self.spec(picture).numpy() for picture in self._pictures(indices)])
        return np.stack([self._load_input(int(index)) for index in indices])

    def _pictures(self, indices: np.ndarray) -> list[Image.Image]:
        arrays = [self.cache[int(i)] if self.cache is not None else self._load_picture(int(i)) for i in indices]
        return [Image.fromarray(array) for array in arrays]

    def _load_input(self, index: int) -> np.ndarray:
        picture = self.source.picture(index)
        try:
            return self.spec(picture).numpy()
        except ValueError as error:  # such as a picture so narrow that resizing it would fill the memory
            raise CorruptImageError(f"cannot preprocess the image {self.source.name(index)}: {error}") from error

    def _load_picture(self, index: int) -> np.ndarray:
        return np.asarray(self.spec.convert(self.source.picture(index)))

    def _picture_shape(self, index: int) -> tuple[int, ...]:
        rows, columns, _ = self.source.shape(index)
        return (rows, columns) if self.spec.channels == 1 else (rows, columns, self.spec.channels)

    def _decoded_bytes(self) -> float:
        if not self._takes_pictures:
            return len(self) * float(np.prod(self.spec.shape))
        sampled = [np.prod(self._picture_shape(int(index))) for index in self.source.spaced(256)]
        return len(self) * float(np.mean(sampled))

    def _decode_all(self) -> PixelCache:
        shapes = [self._picture_shape(i) if self._takes_pictures else self.spec.shape for i in range(len(self))]
        cache = PixelCache(shapes)
        cache.fill(self._load_picture if self._takes_pictures else self._load_input)
        return cache


def readable(source: ImageSource) -> tuple[ImageSource, list[str]]:
    """Decode every picture once and leave out those that are corrupt.

    Returns:
        The pictures that can be decoded, and the names of the others.
    """
    outcome = list(in_threads(source.picture, len(source)))
    bad = [source.name(index) for index, error in enumerate(outcome) if error is not None]
    return (source.subset(np.flatnonzero([error is None for error in outcome])) if bad else source), bad


def as_is(batch: Any) -> Any:
    """Collate nothing: the dataset returns whole batches."""
    return batch
