"""A split as the loader sees it: pictures preprocessed or augmented into uint8 batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cleave.deployment import ImageInput

from .augment import Augmentation
from .caching.cache import AUTO_CACHE_BYTES, PixelCache
from .caching.feature_cache import FeatureCache
from .drawing import Key, sample_seeds
from .look import corrupt_pictures
from .mixing import Mixing
from .sources import CorruptImageError, ImageSource

Batch = dict[str, Any]
"""Parts of a batch by name: ``images`` uint8 (B, C, H, W), ``labels`` int64 (B,), further ones, and ``given``."""

Values = np.ndarray | Tensor | Callable[[np.ndarray], Any]
"""A further part of every picture: (N, ...), or what returns the part of a batch for int64 indices (B,)."""


class ImageDataset(Dataset[Batch]):
    """Yields uint8 images with their labels and further parts, by index or, augmented, by (epoch, index).

    What is cached is what is the same in every epoch: the preprocessed image where the augmentation starts from it,
    otherwise (random resized crops) the decoded original picture.

    Args:
        source: The pictures.
        spec: How a picture becomes the network's input.
        augmentation: Augmentation of the images, or ``None`` for evaluation.
        seed: With (epoch, index) it fixes the augmentation.
        cache: ``True``, ``False``, or ``"auto"``: if the decoded pictures take at most ``AUTO_CACHE_BYTES``.
        labels: Whether batches hold labels.
        further: Further parts of a batch by name.
        maps: Names of those further parts that lie on the image's grid, (B, ..., H, W), and are cropped and mirrored
            with it.
        mixing: What mixes the images of a batch and their labels, in training.

    Attributes:
        features: Features of frozen parts that batches bring along as ``given``, or ``None``. Augmentation is then
            drawn for (epoch modulo its views, index), which are the images that they were computed of.
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
        labels: bool = True,
        further: Mapping[str, Values] | None = None,
        maps: Sequence[str] = (),
        mixing: Mixing | None = None,
    ) -> None:
        self.source = source
        self.spec = spec
        self.augmentation = augmentation
        self.seed = seed
        self.labels = labels
        self.further = dict(further or {})
        self.maps = tuple(maps)
        self.mixing = mixing
        self._check_parts()
        self.features: FeatureCache | None = None
        self.with_images = True
        self._takes_pictures = augmentation is not None and augmentation.takes_pictures
        self.cache: PixelCache | None = None
        if self.keeps_decoded(cache):
            self.cache = self._decode_all()

    def __len__(self) -> int:
        return len(self.source)

    def keeps_decoded(self, cache: bool | str) -> bool:
        """Whether decoded pictures are kept in memory, for a value of ``cache``."""
        return cache is True or (cache == "auto" and self._decoded_bytes() <= AUTO_CACHE_BYTES)

    def corrupt(self, title: str) -> dict[int, CorruptImageError]:
        """Read every picture as a loader would, and return the errors of those that cannot be used, by index.

        Args:
            title: What is shown beside the progress bar of a long look.
        """
        load = self._load_picture if self._takes_pictures else self._load_input
        how = f"{self.spec.color_mode} picture" if self._takes_pictures else repr(self.spec)
        return corrupt_pictures(self.source, load, how, title)

    def __getitem__(self, key: int | Key | list[Key]) -> Batch:
        """Return the parts of one sample: a uint8 image (C, H, W), its label, a scalar int64 tensor, and others.

        Of a list of keys, as samplers of whole batches yield them, the batch; without keys one of no samples.
        """
        if isinstance(key, list):
            return self.__getitems__(key) if key else _none_of(self.__getitems__([(0, 0)]))
        return {name: values[0] for name, values in self.batch([key]).items()}

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        """Return a whole batch: of :meth:`batch`, and with :attr:`features` every one (B, ...) as stored."""
        if self.features is None:
            return self.batch(keys)
        rows = np.array([view * len(self) + index for view, index in self._pairs(keys)], dtype=np.int64)
        return self.batch(keys, images=self.with_images) | {"given": self.features.batch(rows)}

    def batch(self, keys: Sequence[int | Key], images: bool = True) -> Batch:
        """Return uint8 ``images`` (B, C, H, W), int64 ``labels`` (B,) and further parts.

        Mixed images have float32 labels (B, classes), the share of each class.

        Args:
            keys: An index or (epoch, index) for every sample; a bare index stands for epoch 0.
            images: ``False`` leaves the images out and decodes none.
        """
        pairs = self._pairs(keys)
        indices = np.array([index for _, index in pairs], dtype=np.int64)
        seeds = None if self.augmentation is None and self.mixing is None else sample_seeds(self.seed, pairs)
        batch: Batch = {"images": self._images(indices, seeds)} if images else {}
        if self.labels:
            batch["labels"] = torch.from_numpy(self.source.labels[indices])
        for name in self.further:
            batch[name] = self._further(name, indices, seeds)
        if self.mixing is not None and seeds is not None and images:
            batch["images"], batch["labels"] = self.mixing(batch["images"], batch["labels"], seeds)
        return batch

    def _images(self, indices: np.ndarray, seeds: np.ndarray | None) -> Tensor:
        if self.augmentation is None or seeds is None:
            return torch.from_numpy(self._inputs(indices))
        images = self._pictures(indices) if self.augmentation.takes_pictures else self._inputs(indices)
        return self.augmentation(images, seeds)

    def _further(self, name: str, indices: np.ndarray, seeds: np.ndarray | None) -> Any:
        values = self.further[name]
        part = values(indices) if callable(values) else torch.as_tensor(values[indices])
        if self.augmentation is None or seeds is None or name not in self.maps:
            return part
        return self.augmentation.move(part, seeds)

    def _check_parts(self) -> None:
        if self.augmentation is not None and self.maps and not self.augmentation.moves_maps:
            raise ValueError(
                f"augment={self.augmentation.name!r} cannot move {list(self.maps)} as it moves the images; use "
                "augment='none', 'crop' or 'crop_flip'"
            )
        for name, values in self.further.items():
            if not callable(values) and len(values) != len(self):
                raise ValueError(f"the part {name!r} has {len(values)} rows for {len(self)} images; give one for each")
        for name in self.maps:
            shape = tuple(self._further(name, np.arange(1), None).shape[1:])
            if shape[-2:] != self.spec.shape[1:]:
                raise ValueError(
                    f"the part {name!r} lies on the images' grid, so its shape must end in {self.spec.shape[1:]}, got "
                    f"{shape}; give it at the size of the input"
                )

    def _pairs(self, keys: Sequence[int | Key]) -> list[Key]:
        pairs = [(0, key) if isinstance(key, int) else key for key in keys]
        if self.features is None:
            return pairs
        return [(epoch % self.features.views, index) for epoch, index in pairs]

    def without_augmentation(self) -> ImageDataset:
        """Return the same images as evaluation sees them, sharing what is decoded."""
        plain = copy.copy(self)
        plain.augmentation = plain.mixing = None
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


def _none_of(batch: Mapping[str, Any]) -> Batch:
    """Return a batch of the same parts without a sample."""
    return {name: _none_of(part) if isinstance(part, Mapping) else part[:0] for name, part in batch.items()}
