"""Hints for names that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
