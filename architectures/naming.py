"""Hints for names that nobody knows, and the check of whole numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, options: Iterable[str], limit: int = 5) -> str:
    """Return a sentence that lists the options nearest to an unknown name.

    Args:
        name: The name that was not found.
        options: The names there are.
        limit: The most options to list.

    Returns:
        ``" Did you mean 'layer2', 'layer1'?"``, nearest first, with a leading space so that it can follow a sentence;
        the empty string where nothing is near.
    """
    candidates = list(dict.fromkeys(str(option) for option in options))
    by_case = {option.lower(): option for option in reversed(candidates)}
    close = difflib.get_close_matches(name.lower(), by_case, n=limit, cutoff=0.6)
    return f" Did you mean {', '.join(repr(by_case[match]) for match in close)}?" if close else ""


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number that is large enough.

    Args:
        name: Name of the argument, for the error.
        value: What was given for it.
        least: The least it may be.

    Raises:
        ValueError: The value is no integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value
