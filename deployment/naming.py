"""Hints for names that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], limit: int = 3) -> str:
    """Return a sentence that lists the known names nearest to an unknown one.

    Returns:
        ``" Did you mean 'layer2', 'layer1'?"``, nearest first, with a leading space so that it can follow a sentence;
        the empty string where nothing is near.
    """
    by_case = {option.lower(): option for option in reversed(list(dict.fromkeys(known)))}
    close = difflib.get_close_matches(str(name).lower(), by_case, n=limit)
    return f" Did you mean {', '.join(repr(by_case[match]) for match in close)}?" if close else ""
