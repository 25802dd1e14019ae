"""Hints for names that nobody knows."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable

# Beyond these a comparison letter by letter would take seconds: names come from strangers' files too.
_MOST_NAMES, _LONGEST = 512, 64
_SHOWN = 20


def did_you_mean(name: object, known: Iterable[str], limit: int = 3) -> str:
    """Return a sentence that lists the known names nearest to an unknown one.

    Returns:
        ``" Did you mean 'layer2', 'layer1'?"``, nearest first, with a leading space so that it can follow a sentence;
        the empty string where nothing is near.
    """
    options = [option for option in itertools.islice(known, _MOST_NAMES) if len(option) <= _LONGEST]
    by_case = {option.lower(): option for option in reversed(list(dict.fromkeys(options)))}
    close = difflib.get_close_matches(str(name)[:_LONGEST].lower(), by_case, n=limit)
    return f" Did you mean {', '.join(repr(by_case[match]) for match in close)}?" if close else ""


def listed(names: Collection[str]) -> str:
    """Return names for a message: all of them, or the first 20 and how many there are.

    Example:
        >>> listed([str(number) for number in range(1000)])
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, … (1000 in all)'
    """
    shown = ", ".join(itertools.islice(names, _SHOWN))
    return shown if len(names) <= _SHOWN else f"{shown}, … ({len(names)} in all)"
