"""Checks of numbers that come from users and from files."""

from __future__ import annotations

import math
import numbers
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; ``True`` and 1.0 are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def expect(name: str, value: Any, kinds: type | tuple[type, ...], way: str) -> None:
    """Raise :class:`TypeError` unless an argument is of a kind; ``way`` says what to give."""
    if not isinstance(value, kinds):
        kind = type(value).__name__
        article = "an" if kind[0].lower() in "aeiou" else "a"
        raise TypeError(f"{name} cannot be {value!r:.200}, {article} {kind}; {way}")


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; ``True`` is none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
