"""Checks of what a user gives: one sentence that names the setting, its value and the way out."""

from __future__ import annotations

import math
from pathlib import Path
from types import UnionType
from typing import Any


def positive(name: str, value: Any, unit: str, *, of: str = "") -> float:
    """Return a number above 0.

    Args:
        name: The argument's name.
        value: What was given.
        unit: What it counts, for the message.
        of: Whose it is, for the message.

    Raises:
        ValueError: It is no finite number above 0.
    """
    whose = f" of {of}" if of else ""
    if value is None:
        raise ValueError(f"{name}{whose} is missing; give {unit}")
    if not _number(value) or value <= 0:
        raise ValueError(f"{name}{whose} must be above 0, {unit}; got {value!r}")
    return float(value)


def not_negative(name: str, value: Any, unit: str, *, of: str = "") -> float:
    """Return a number of at least 0; ValueError as :func:`positive` raises it."""
    whose = f" of {of}" if of else ""
    if not _number(value) or value < 0:
        raise ValueError(f"{name}{whose} must be at least 0, {unit}; got {value!r}")
    return float(value)


def of_type(name: str, value: Any, kind: type | UnionType, what: str, *, of: str = "") -> None:
    """Check that an argument is of its type; ValueError says what it should be."""
    if not isinstance(value, kind):
        whose = f" of {of}" if of else ""
        raise ValueError(f"{name}{whose} must be {what}; got {value!r:.100}")


def file_there(file: Path | str, holds: str) -> Path:
    """Return the path of a file that is there; FileNotFoundError says what it should hold."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file} of {holds}; give the path of one")
    return Path(file)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
