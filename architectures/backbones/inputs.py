"""What images a backbone was made for, as its source says it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

from cleave.architectures.naming import did_you_mean
from cleave.deployment.runtime.preprocess import ImageInput

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: What the sources call the constructor argument that fixes a network's image size.
SIZE_ARGUMENTS = ("img_size", "image_size", "input_size")


def describe_input(
    height: int,
    width: int,
    in_channels: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    resize: int | None = None,
    interpolation: str = "bilinear",
) -> ImageInput:
    """Describe an input; for grey images mean and standard deviation are averaged over the colours."""
    if in_channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    mode = "L" if in_channels == 1 else "RGB"
    return ImageInput(height, width, mode, tuple(mean), tuple(std), resize, interpolation)


def timm_input(name: str, network: nn.Module, in_channels: int) -> ImageInput:
    """Translate timm's evaluation transform; what has no exact counterpart is logged."""
    config = resolve_model_data_config(network)
    height, width = config["input_size"][-2:]
    fraction, mode = config["crop_pct"], config["crop_mode"]
    resize: int | None = math.floor(max(height, width) / min(fraction, 1.0))
    if mode != "center" and fraction == 1.0:
        resize = None
    if mode == "border" or fraction > 1.0 or (mode == "squash" and fraction < 1.0):
        logger.warning(
            "timm evaluates %s with crop_mode=%s and crop_pct=%s; pictures are resized to %s and cropped instead, "
            "which may cost accuracy on pictures that are not square",
            *(name, mode, fraction, resize or (height, width)),
        )
    return describe_input(height, width, in_channels, config["mean"], config["std"], resize, config["interpolation"])


def constructed_size(options: Mapping[str, Any]) -> dict[str, int]:
    """Read the image size that a constructor was told to build for."""
    size = next((options[key] for key in SIZE_ARGUMENTS if options.get(key)), None)
    if size is None:
        return {}
    height, width = (size, size) if isinstance(size, int) else size
    return {"height": height, "width": width}


def override_input(base: ImageInput, overrides: Mapping[str, Any], in_channels: int) -> ImageInput:
    """Return an input with some fields replaced; ``resize`` scales along with a new size."""
    known = [field.name for field in dataclasses.fields(ImageInput)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"image_input has no field {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}")
    values = dict(overrides)
    if base.resize is not None and "resize" not in values:
        side = max(values.get("height", base.height), values.get("width", base.width))
        values["resize"] = round(base.resize * side / max(base.height, base.width))
    spec = dataclasses.replace(base, **values)
    if spec.channels != in_channels:
        raise ValueError(f"image_input.color_mode={spec.color_mode!r} has {spec.channels} channels, not {in_channels}")
    return spec
