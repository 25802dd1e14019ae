"""Why a backbone cannot be taken apart, in words: the line, the layer, and what to change."""

from __future__ import annotations

import functools
import linecache
import re
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

import torch

WAY_OUT = "Put that code into a module of its own, which stays whole as long as no cut lies in it, or cut elsewhere."
_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_LIBRARY = sysconfig.get_paths()["stdlib"]

# What an error of a tracer means to who wrote the forward, by what the error says.
_REASONS = (
    (r"cannot be iterated|object is not iterable|not iterable", "loops over a tensor or unpacks it"),
    (r"'len' is not supported|has no len\(\)", "asks for the length of a tensor"),
    (
        r"interpreted as an integer|must be a string, a bytes-like object or a (?:real )?number, not|"
        r"must be real number|only integer tensors|__(?:index|int|float)__",
        "takes a number from a tensor or from its size",
    ),
    (r"Expected a value of type 'Tensor|ScriptFunction|torch\.jit", "calls a scripted function"),
    (r"argument of type: <class '(?:function|method|functools\.partial)'>", "hands a function to another one"),
    (r"argument of type: <class '(.+)'>", r"hands an object of type \1 to an operation"),
    (r"cannot assign .* as (?:parameter|buffer) '(\w+)'", r"assigns a new value to self.\1"),
)


class CutError(ValueError):
    """A backbone cannot be taken apart as asked; the message says why, in the names of its layers."""


class RefusalError(CutError):
    """What a forward does and a cut would lose; the message is the rest of a sentence that its line begins.

    Args:
        reason: What the line does, such as "branches on a random draw".
        way_out: What to change.
    """

    def __init__(self, reason: str, way_out: str = WAY_OUT) -> None:
        super().__init__(reason)
        self.reason, self.way_out = reason, way_out


def refused(error: Exception, backbone: str, layer: str, line: str | None = None) -> CutError:
    """Say in words why a forward that must be opened cannot be.

    Args:
        error: What was raised while it was traced.
        backbone: Type name of the backbone.
        layer: Name of the layer whose forward it is; empty for the backbone itself.
        line: The line, where ``error`` was not raised in it.
    """
    if isinstance(error, CutError) and not isinstance(error, RefusalError):
        return error
    reason, way_out = (error.reason, error.way_out) if isinstance(error, RefusalError) else (_reason(error), WAY_OUT)
    whose = f"the forward of {layer!r}" if layer else f"the forward of {backbone}"
    line = line or line_of(error.__traceback__)
    said = f"{line} in {whose} {reason}" if line else f"{whose} {reason}"
    return CutError(f"{backbone} cannot be taken apart here: {said}. {way_out}")


def line_of(trace: TracebackType | None) -> str | None:
    """Return the innermost line of a traceback that is the user's: its file, number and text."""
    frames = [(each.filename, each.lineno or 0) for each in traceback.extract_tb(trace)]
    return next((shown(*frame) for frame in reversed(frames) if is_users(frame[0])), None)


@functools.cache
def is_users(filename: str) -> bool:
    """Whether a file is neither torch's, Python's, nor one of those that cut."""
    if filename.startswith((*_INTERNAL, "<")):
        return False
    return not filename.startswith(_LIBRARY) or "site-packages" in filename


def shown(filename: str, number: int) -> str:
    """Return a line of a file as a message shows it."""
    text = linecache.getline(filename, number).strip()
    return f"{Path(filename).name}:{number}" + (f" `{text}`" if text else "")


def first_line(error: Exception | None) -> str:
    """Name an error's type and cause in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _reason(error: Exception) -> str:
    for pattern, reason in _REASONS:
        if found := re.search(pattern, str(error)):
            return found.expand(reason) + ", which a cut would freeze"
    return f"cannot be recorded ({first_line(error)})"
