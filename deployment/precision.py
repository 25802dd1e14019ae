"""Computing in the precision that a bundle states, whatever a caller's block of autocast says."""

from __future__ import annotations

import contextlib
import functools

import torch

_NOTHING = contextlib.nullcontext()


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast is off for a device, and for the CPU beside it; for this thread alone."""
    kinds = [kind for kind in _kinds(device.type) if torch.is_autocast_enabled(kind)]
    if not kinds:
        return _NOTHING
    stack = contextlib.ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


@functools.cache
def _kinds(kind: str) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(("cpu", kind)) if torch.amp.is_autocast_available(name))
