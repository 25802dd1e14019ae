"""How much a bundle may hold: far more than any network needs, and little enough to be checked at once."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from .files import BundleError

MAX_DEPTH = 64
MAX_PARTITIONS = 512
MAX_EDGES = 2048
MAX_TENSORS = 256
MAX_OUTPUTS = 256
MAX_EXITS = 128
MAX_CLASSES = 2**17
MAX_NAME = 256
MAX_CLASS_NAME = 1024
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**32


def at_most(items: Sized, limit: int, what: str) -> None:
    """Raise :class:`BundleError` where there are more of something than ``limit``."""
    if len(items) > limit:
        raise BundleError(f"{what}: a bundle has at most {limit}, got {len(items)}")


def check_label(name: Any, what: str, limit: int = MAX_NAME) -> None:
    """Raise :class:`BundleError` unless ``name`` is text that every reader can hold: not empty, not too long, Unicode.

    Unlike a file's name it may hold any character.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= limit:
        shown = f"{len(name)} characters" if isinstance(name, str) else repr(name)[:80]
        raise BundleError(f"{what} must be a name of 1 to {limit} characters, got {shown}")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise BundleError(f"{what} {name!a} holds half a character, which no file can hold") from None


def check_depth(values: Any, what: str) -> None:
    """Raise :class:`BundleError` where JSON values are nested deeper than ``MAX_DEPTH``; recursion ends there."""
    level, depth = [values], 0
    while level := [item for value in level for item in _inside(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise BundleError(f"{what} is nested too deeply: at most {MAX_DEPTH} lists and objects in each other")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
