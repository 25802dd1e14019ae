"""What kind of network a config describes, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cleave.architectures.linking.described import crosses


def kind_of(description: Mapping[str, Any]) -> str:
    """Say what kind of network a description is of, as in ``an early-exit checkpoint``."""
    # What passes from one network to the other is sent, too.
    split = description["split"]["at"] is not None or crosses((description.get("links") or {}).get("path"))
    exits = description["exits"]
    early = bool(exits["at"]) or exits["count"] is not None
    return kind_words(split, early)


def kind_words(split: bool, early: bool) -> str:
    """Name the kind of a network that is split, or has early exits, or both, or neither."""
    return {(True, True): "a split early-exit", (True, False): "a split", (False, True): "an early-exit"}.get(
        (split, early), "an unsplit"
    )
