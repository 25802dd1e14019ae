"""How an image file becomes the uint8 tensor that a network's device partition takes."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import is_finite, is_whole

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
COLOR_MODES = {"L": 1, "RGB": 3}
# The largest picture that is decoded or resized to: a small file can claim a size that would fill the memory.
MAX_PIXELS = 89_478_485
_MAX_SIDE = 16_384
_STEPS = {"La": "LA", "LAB": "RGB"}


class ImageError(ValueError):
    """A file that cannot be used as a picture; the message names it."""


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """The input a network was trained with: colour mode, resize, centre crop, and normalisation.

    One object describes the input in the data module, in the checkpoint and in a bundle's manifest, and calling it
    preprocesses a picture the same way in all three. Pillow alone does the work, so that a device needs no torchvision;
    its filters are antialiased, which is what pretrained weights expect of pictures, and the pixels equal those of
    torchvision's ``Resize`` and ``CenterCrop`` on a Pillow image. As there, an EXIF orientation tag is not applied:
    published weights and the usual data sets know pictures as they are stored. Whoever wants them upright turns them
    with ``PIL.ImageOps.exif_transpose`` before training and before inference.

    Args:
        height: Rows of the network's input in pixels, after the crop.
        width: Columns of the network's input in pixels, after the crop.
        color_mode: ``"RGB"`` (3 channels) or ``"L"`` (1 channel, luma); pictures of any other mode are converted.
        mean: Per-channel mean, on the scale 0 to 1, subtracted after division by 255.
        std: Per-channel standard deviation, on the same scale.
        resize: ``None`` resizes straight to ``(height, width)``; an integer resizes the shorter side to that many
            pixels, keeps the aspect ratio and then crops the centre.
        interpolation: ``nearest``, ``box``, ``bilinear``, ``hamming``, ``bicubic`` or ``lanczos``.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.

    Example:
        >>> from PIL import Image
        >>> spec = ImageInput(height=8, width=8, color_mode="L", mean=(0.5,), std=(0.5,))
        >>> spec(Image.new("RGB", (20, 16))).shape
        torch.Size([1, 8, 8])
    """

    kind: ClassVar[str] = "image"
    name: ClassVar[str] = "images"
    dtype: ClassVar[str] = "uint8"

    height: int
    width: int
    color_mode: str = "RGB"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _numbers("mean", self.mean))
        object.__setattr__(self, "std", _numbers("std", self.std))
        for name in ("height", "width", "resize"):
            value = getattr(self, name)
            if name == "resize" and value is None:
                continue
            if not (is_whole(value) and 1 <= value <= _MAX_SIDE):
                raise ValueError(f"{name} must be 1 to {_MAX_SIDE} pixels, a whole number, got {value!r:.200}")
            object.__setattr__(self, name, int(value))
        for name, known in (("color_mode", COLOR_MODES), ("interpolation", INTERPOLATIONS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} must be one of {sorted(known)}, got {value!r:.200}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean and std need {self.channels} values for color_mode={self.color_mode!r}, "
                f"got mean={self.mean} and std={self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise ValueError(
                f"resize={self.resize} is smaller than the {self.height}x{self.width} crop; "
                f"use at least {max(self.height, self.width)} or None"
            )

    @property
    def channels(self) -> int:
        """Number of channels of the tensor: 3 for RGB, 1 for L."""
        return COLOR_MODES[self.color_mode]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one preprocessed image."""
        return self.channels, self.height, self.width

    def __call__(self, image: Image.Image) -> Tensor:
        """Preprocess one picture.

        Args:
            image: A picture of any size and mode; see :meth:`convert`.

        Returns:
            uint8 tensor of shape (C, H, W), not normalised: the device partition normalises.

        Raises:
            ValueError: The mode cannot be converted, or so narrow a picture would grow beyond ``MAX_PIXELS``.
        """
        image = self.convert(image)
        columns, rows = image.size
        if self.resize is None:
            size = (self.width, self.height)
        else:
            shorter = min(columns, rows)
            size = (self.resize * columns // shorter, self.resize * rows // shorter)
            if size[0] * size[1] > MAX_PIXELS:
                raise ImageError(
                    f"a picture of {columns}x{rows} pixels, resized to {self.resize} at its shorter side, would have "
                    f"{size[0]}x{size[1]} pixels, more than {MAX_PIXELS}"
                )
        if image.size != size:
            image = image.resize(size, INTERPOLATIONS[self.interpolation])
        left, top = round((size[0] - self.width) / 2), round((size[1] - self.height) / 2)
        return self.to_tensor(image.crop((left, top, left + self.width, top + self.height)))

    def convert(self, image: Image.Image) -> Image.Image:
        """Bring a picture of any mode and its own size to ``color_mode``.

        Transparency is dropped: the colours behind it stay. 16-bit grey keeps its upper 8 bits, where Pillow alone
        would turn all but the darkest 256 values white.

        Raises:
            ValueError: 32-bit grey (modes ``I`` and ``F``), whose range is not known.
        """
        if image.mode in ("I", "F"):
            raise ImageError(f"a picture of 32-bit grey (mode {image.mode!r}) has no known range; store 8 or 16 bits")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        # Modes that Pillow does not convert in one step, or not without a warning, take another on the way.
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")
        elif image.mode in _STEPS:
            image = image.convert(_STEPS[image.mode])
        return image if image.mode == self.color_mode else image.convert(self.color_mode)

    def to_tensor(self, image: Image.Image) -> Tensor:
        """Turn a picture into a uint8 tensor (C, H, W) of its own size, in this input's colour mode."""
        array = np.array(self.convert(image), dtype=np.uint8)
        return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """Scale uint8 images (..., C, H, W) to 0..1 and normalise them with ``mean`` and ``std``, as float32."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        return (images.to(torch.float32) / 255.0 - mean) / std

    def mirrored(self, batch: Tensor) -> Tensor:
        """Return the negatives of uint8 images, a batch as unlike them as images can be."""
        return 255 - batch

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; :meth:`from_dict` reads them back."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageInput:
        """Build the input from :meth:`to_dict`'s values.

        Raises:
            ValueError: A key is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping):
            raise ValueError(f"an image input is an object, got {type(values).__name__}")
        if unknown := set(values) - known:
            raise ValueError(f"unknown image input keys {sorted(unknown)}; known are {sorted(known)}")
        if missing := {"height", "width"} - set(values):
            raise ValueError(f"the image input lacks {sorted(missing)}")
        return cls(**values)


def open_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read and decode an image file wholly; of an animation, its first frame.

    Raises:
        ImageError: The file is missing, is no picture, is damaged or cut short, or has more than ``max_pixels``
            pixels; the message names the path.
    """
    try:
        with Image.open(path) as image:
            columns, rows = image.size
            if columns * rows > max_pixels:
                raise ImageError(f"{columns}x{rows} pixels are more than {max_pixels}")
            image.load()
            return image
    # Pillow's decoders answer broken data with almost any exception: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise ImageError(f"cannot read {os.fspath(path)} as an image: {error}") from error


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    found = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping) else ()
    if not found or not all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in found):
        raise ValueError(f"{name} must be a list of numbers, one per channel, got {values!r:.200}")
    if not all(is_finite(value) for value in found):
        raise ValueError(f"{name} must be finite, got {values!r:.200}")
    return tuple(float(value) for value in found)
