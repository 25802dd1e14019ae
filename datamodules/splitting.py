"""Fixed, stratified splits that depend on the pictures' names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from .sources import ImageSource


def split_off(source: ImageSource, fraction: float, class_names: Sequence[str]) -> tuple[ImageSource, ImageSource]:
    """Split off a share of every class, the same one on every machine and in every version of every library.

    Within a class the pictures are ranked by the SHA-256 of their keys and the first ``fraction`` of them is split off:
    the split hangs on no random generator, no listing order and no seed, and adding pictures moves few others.

    Args:
        source: The pictures to divide.
        fraction: Share of every class that is split off, above 0 and below 1; at least one picture is taken and left.
        class_names: Names of the classes, for messages.

    Returns:
        What stays and what is split off, both in the source's order.

    Raises:
        ValueError: ``fraction`` is out of range or a class has fewer than two pictures.
    """
    check_fraction(fraction)
    digests = np.array([hashlib.sha256(key.encode()).hexdigest() for key in source.keys()])  # noqa: SIM118
    taken = np.zeros(len(source), dtype=bool)
    for label, class_name in enumerate(class_names):
        members = np.flatnonzero(source.labels == label)
        if len(members) < 2:
            raise ValueError(
                f"the class {class_name!r} has {len(members)} image(s), too few to split some off; add images, or "
                "bring the missing split yourself"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken[members[np.argsort(digests[members], kind="stable")[:count]]] = True
    return source.subset(np.flatnonzero(~taken)), source.subset(np.flatnonzero(taken))


def check_fraction(fraction: float) -> None:
    """Raise a ValueError unless ``fraction`` lies between 0 and 1."""
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {fraction}")


def check_val_from(val_from: str) -> None:
    """Raise a ValueError unless ``val_from`` names a split that validation images can come from."""
    if val_from not in ("train", "test"):
        raise ValueError(f"val_from must be 'train' or 'test', got {val_from!r}")
