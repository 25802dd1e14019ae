"""A random part of the training images, and the rest of them: members and non-members of a training."""

from __future__ import annotations

import re

import numpy as np
import torch

from .arguments import check_whole
from .drawing import stream_seed
from .sources import ImageSource

REST = "rest"
"""The split of the training images that a part leaves out."""


def check_part(part: str | None, part_seed: int) -> None:
    """Raise a ValueError unless ``part`` is ``None`` or such as ``1/2``, and ``part_seed`` a whole number."""
    check_whole("part_seed", part_seed, 0)
    if part is not None:
        _numbers(part)


def _numbers(part: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", part) if isinstance(part, str) else None
    number, of = (int(each) for each in found.groups()) if found else (0, 0)
    if not 1 <= number <= of or of < 2:
        raise ValueError(
            f"part must be one of several even parts of the training images, such as 1/2 or 3/4, got {part!r}; null "
            "takes all"
        )
    return number, of


def part_of(source: ImageSource, part: str, part_seed: int, rest: bool = False) -> ImageSource:
    """Return a part of the pictures in their order, or the rest of them.

    The division depends on ``part_seed`` and the number of pictures alone: 1/2 and 2/2 have none in common.

    Raises:
        ValueError: There are fewer pictures than parts.

    Example:
        >>> from .sources import ArraySource
        >>> source = ArraySource(np.zeros((5, 2, 2), np.uint8), None, "train")
        >>> len(part_of(source, "1/2", 0)), len(part_of(source, "1/2", 0, rest=True))
        (3, 2)
    """
    number, of = _numbers(part)
    if len(source) < of:
        raise ValueError(f"part={part} divides {len(source)} training images, fewer than {of}; use fewer parts")
    generator = torch.Generator().manual_seed(stream_seed(part_seed, "part"))
    order = torch.randperm(len(source), generator=generator).numpy()
    inside = np.zeros(len(source), dtype=bool)
    inside[order[number - 1 :: of]] = True
    return source.subset(np.flatnonzero(inside != rest))
