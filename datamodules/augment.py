"""Standard training augmentations, drawn for each image from its own seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from cleave.deployment import ImageInput

from .drawing import draw


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a named augmentation does.

    Args:
        crop: ``"padded"`` crops at random from the image padded by an eighth of its sides with zeros, ``"resized"``
            crops 8 to 100 % of the original picture at an aspect ratio of 3/4 to 4/3 and resizes it, ``None`` neither.
        flip: Whether half of the images are mirrored left to right.
        policy: Builds a further transform of a uint8 image (C, H, W).
    """

    crop: str | None = None
    flip: bool = False
    policy: Callable[[], Any] | None = None


PRESETS = {
    "none": Preset(),
    "crop": Preset("padded"),
    "crop_flip": Preset("padded", flip=True),
    "randaugment": Preset("padded", flip=True, policy=v2.RandAugment),
    "trivial": Preset("padded", flip=True, policy=v2.TrivialAugmentWide),
    "imagenet": Preset("resized", flip=True),
    "imagenet_randaugment": Preset("resized", flip=True, policy=v2.RandAugment),
    "imagenet_trivial": Preset("resized", flip=True, policy=v2.TrivialAugmentWide),
}


class Augmentation:
    """A preset at a given input; equal seeds give equal images, whatever else is drawn between them.

    Crop and flip are drawn by hashing the seeds, for they must keep up with small images; they have exactly the
    distribution of torchvision's ``RandomCrop(padding)`` and ``RandomHorizontalFlip``. All else is torchvision's own,
    run under the sample's seed.

    Args:
        name: A key of ``PRESETS``.
        spec: The input that the images are made for.
        further: Transforms of uint8 images (C, H, W) that follow, each under a seed of its own; they draw by torch and
            keep type and size.
        words: Tells them from others.

    Raises:
        ValueError: The name is unknown, or a transform gives something else than images of the same size.
    """

    def __init__(
        self, name: str, spec: ImageInput, further: Sequence[Callable[[Any], Any]] = (), words: str = ""
    ) -> None:
        check_preset(name)
        preset = PRESETS[name]
        self.name = f"{name}{words}"
        self.spec = spec
        self.further = tuple(further)
        self.flip = preset.flip
        self.padding = (
            (round_half_up(spec.height / 8), round_half_up(spec.width / 8)) if preset.crop == "padded" else None
        )
        self.policy = preset.policy() if preset.policy else None
        self.resized_crop: Any = None
        if preset.crop == "resized":
            interpolation = InterpolationMode(spec.interpolation)
            self.resized_crop = v2.RandomResizedCrop((spec.height, spec.width), interpolation=interpolation)

    @property
    def takes_pictures(self) -> bool:
        """Whether it starts from the original pictures instead of the preprocessed images."""
        return self.resized_crop is not None

    @property
    def moves_maps(self) -> bool:
        """Whether :meth:`move` can follow: crops of pictures and torchvision's policies move images alone."""
        return self.resized_crop is None and self.policy is None and not self.further

    def __call__(self, images: np.ndarray | Sequence[Image.Image], seeds: np.ndarray) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8 array (B, C, H, W), or pictures if ``takes_pictures``.
            seeds: One uint64 seed per image, shape (B,).

        Returns:
            uint8 tensor of shape (B, C, H, W).
        """
        if self.takes_pictures:
            batch = self._mirrored(self._crop_pictures(images, seeds), seeds)  # type: ignore[arg-type]
        else:
            batch = self.move(np.asarray(images), seeds)
        steps = [] if self.policy is None else [(4, self.policy)]
        for stream, transform in [*steps, *enumerate(self.further, start=5)]:
            done = [self._under(seed, transform, image) for seed, image in zip(draw(seeds, stream), batch, strict=True)]
            check_kept(transform, batch[0], done)
            batch = torch.stack(done)
        return batch

    def move(self, maps: np.ndarray | Tensor, seeds: np.ndarray) -> Tensor:
        """Crop and mirror what lies on the images' grid, (B, ..., H, W), as images of these seeds; zeros move in."""
        array = np.asarray(maps)
        if self.padding is not None:
            array = padded_crop(array, seeds, *self.padding)
        return self._mirrored(array, seeds)

    def _mirrored(self, array: np.ndarray, seeds: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(mirror(array, seeds) if self.flip else array))

    def _crop_pictures(self, pictures: Sequence[Image.Image], seeds: np.ndarray) -> np.ndarray:
        crops = [self._under(seed, self.resized_crop, p) for seed, p in zip(draw(seeds, 3), pictures, strict=True)]
        return np.stack([self.spec.to_tensor(crop).numpy() for crop in crops])

    @staticmethod
    def _under(seed: np.uint64, transform: Callable[[Any], Any], image: Any) -> Any:
        with cpu_seed(int(seed)):
            return transform(image)


def check_kept(transform: Any, image: Tensor, done: Sequence[Any]) -> None:
    """Raise a ValueError unless a transform kept type and size of every image."""
    for each in done:
        if not isinstance(each, Tensor) or each.dtype != image.dtype or each.shape != image.shape:
            made = f"{each.dtype} {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(
                f"the transform {transform} makes {made} of a uint8 image {tuple(image.shape)}; it must keep type and "
                "size, as normalising and resizing are the input's"
            )


def check_preset(name: str) -> None:
    """Raise a ValueError that lists the presets if ``name`` is none of them."""
    if name not in PRESETS:
        raise ValueError(f"unknown augment={name!r}; known are {sorted(PRESETS)}")


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves up, and to at least 1."""
    return max(int(value + 0.5), 1)


def padded_crop(images: np.ndarray, seeds: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Shift every image by up to ``rows`` and ``columns`` pixels either way, zeros moving in.

    Args:
        images: Array (B, ..., H, W).
        seeds: uint64 array (B,).
        rows: Largest shift up and down in pixels.
        columns: Largest shift left and right in pixels.

    Returns:
        Array (B, ..., H, W) of the same type.
    """
    height, width = images.shape[-2:]
    padded = np.pad(images, (*[(0, 0)] * (images.ndim - 2), (rows, rows), (columns, columns)))
    tops = (draw(seeds, 0) % np.uint64(2 * rows + 1)).tolist()
    lefts = (draw(seeds, 1) % np.uint64(2 * columns + 1)).tolist()
    out = np.empty_like(images)
    for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        out[i] = padded[i, ..., top : top + height, left : left + width]
    return out


def mirror(images: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Mirror half of the images left to right; (B, ..., H, W) in and out, in place."""
    chosen = (draw(seeds, 2) >> np.uint64(63)).astype(bool)
    images[chosen] = images[chosen][..., ::-1]
    return images


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block and restore it afterwards; accelerators are left alone."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
