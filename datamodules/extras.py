"""What is done to training images behind the presets: colour jitter, random erasing, and transforms of a user's own."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchvision.transforms import v2

from .arguments import imported

JITTERED = ("brightness", "contrast", "saturation", "hue")
Transform = Callable[[Any], Any]
Described = Mapping[str, Any] | Transform


def further_transforms(
    color_jitter: float | Mapping[str, float] | None, random_erasing: float, transforms: Sequence[Described] | None
) -> tuple[list[Transform], str]:
    """Build what follows a preset, in this order: colour jitter, a user's own transforms, random erasing.

    Args:
        color_jitter: How far brightness, contrast and saturation are changed at most, 0.4 for 40 %; or these and
            ``hue`` (at most 0.5) by name.
        random_erasing: Share of the images in which a rectangle is blackened (Zhong et al. 2020).
        transforms: Transforms of uint8 images (C, H, W), as of ``torchvision.transforms.v2``, or their descriptions:
            ``_target_``, a dotted name, and arguments.

    Returns:
        The transforms, and a text that tells them from others.

    Raises:
        ValueError: An argument is out of range, or a transform cannot be built.
    """
    found: list[Transform] = []
    if color_jitter:
        found.append(v2.ColorJitter(**_jitter(color_jitter)))
    if isinstance(transforms, Mapping | str) or not isinstance(transforms, Sequence | None):
        raise ValueError(f"transforms must be a list, each with _target_, got {transforms!r}")
    found += [built(each) for each in transforms or ()]
    if not _is_number(random_erasing) or not 0 <= random_erasing <= 1:
        raise ValueError(f"random_erasing must lie between 0 and 1, got {random_erasing!r}")
    if random_erasing:
        found.append(v2.RandomErasing(p=float(random_erasing)))
    parts = [f"jitter {color_jitter}"] if color_jitter else []
    parts += [str(each) for each in transforms or ()] + ([f"erasing {random_erasing}"] if random_erasing else [])
    return found, "".join(f" + {part}" for part in parts)


def built(description: Any) -> Any:
    """Build a transform from its description, those inside it too; what is none stays as it is.

    Raises:
        ValueError: It cannot be imported or built, or is nothing that can be called.
    """
    if isinstance(description, list | tuple):
        return [built(each) for each in description]
    if not isinstance(description, Mapping):
        return description
    name = str(description.get("_target_"))
    try:
        transform = imported(name)(
            **{key: built(value) for key, value in description.items() if not key.startswith("_")}
        )
    except Exception as error:  # a stranger's constructor may raise anything
        raise ValueError(f"transforms: {name} cannot be built: {error}") from error
    if not callable(transform):
        raise ValueError(f"transforms: {name} gives {type(transform).__name__}, which cannot be called with an image")
    return transform


def _jitter(given: Any) -> dict[str, float]:
    changes = dict.fromkeys(JITTERED[:3], given) if _is_number(given) else given
    if not isinstance(changes, Mapping) or (unknown := sorted(set(changes) - set(JITTERED))):
        what = f"knows {', '.join(JITTERED)}, not {unknown}" if isinstance(changes, Mapping) else "must be a number"
        raise ValueError(f"color_jitter {what}; got {given!r}")
    for name, value in changes.items():
        most = 0.5 if name == "hue" else math.inf
        if not _is_number(value) or not 0 <= value <= most:
            raise ValueError(f"color_jitter: {name} must be a number from 0 to {most}, got {value!r}")
    return {name: float(value) for name, value in changes.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
