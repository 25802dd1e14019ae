"""Checks of arguments that several files share, and a user's changes to a backbone's input."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Sequence
from typing import Any

from cleave.deployment import ImageInput


def imported(path: str) -> Any:
    """Return what a dotted path names; ImportError, AttributeError or ValueError where it leads nowhere."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a value is an ``int`` of at least ``least``; ``True`` and NumPy's integers are none.

    Arguments are hyper-parameters, which a checkpoint can load back only as plain Python numbers.
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise a ValueError that names the argument unless it is an integer of at least ``least``."""
    if not is_whole(value, least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_cache(cache: bool | str) -> None:
    """Raise a ValueError unless ``cache`` is ``True``, ``False`` or ``"auto"``."""
    if not isinstance(cache, bool) and cache != "auto":
        raise ValueError(f"cache must be True, False or 'auto', got {cache!r}")


def input_changes(
    image_size: int | Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
) -> dict[str, Any]:
    """Return the fields of :class:`~cleave.deployment.ImageInput` that the given arguments override.

    Args:
        image_size: Side in pixels, or (height, width).
        mean: Per-channel mean.
        std: Per-channel standard deviation.
        interpolation: Resize filter.

    Raises:
        ValueError: ``image_size`` is neither a positive integer nor two of them.
    """
    changes: dict[str, Any] = {}
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2 or not all(is_whole(side, 1) for side in sides):
            raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
        changes["height"], changes["width"] = sides
    if mean is not None:
        changes["mean"] = tuple(mean)
    if std is not None:
        changes["std"] = tuple(std)
    if interpolation is not None:
        changes["interpolation"] = interpolation
    return changes


def changed_input(spec: ImageInput, changes: dict[str, Any]) -> ImageInput:
    """Return an input with some fields changed; another size scales a resize of the shorter side in proportion.

    Raises:
        ValueError: A change does not fit, such as one mean for three channels.
    """
    changes = dict(changes)
    if spec.resize is not None and "height" in changes and "resize" not in changes:
        scale = max(changes["height"] / spec.height, changes["width"] / spec.width)
        changes["resize"] = max(round(spec.resize * scale), changes["height"], changes["width"])
    return dataclasses.replace(spec, **changes)


def check_classes(classes: Sequence[str] | None) -> None:
    """Raise a ValueError unless ``classes`` is ``None`` or a list of at least two different names."""
    if classes is None:
        return
    if isinstance(classes, str) or len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"classes must be a list of at least two different names, got {classes!r}")


def picked_classes(known: Sequence[str], classes: Sequence[str] | None, where: str) -> list[str]:
    """Return those of the known classes that are asked for, in the order of the known ones.

    Raises:
        ValueError: A class is unknown; the message lists near ones.
    """
    for name in classes or ():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) or list(known[:10])
            raise ValueError(f"classes names {name!r}, which {where} lacks; it has {', '.join(map(repr, near))}")
    return [name for name in known if classes is None or name in classes]
