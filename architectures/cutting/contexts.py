"""Contexts that a forward opens around its steps: gradients on or off, mixed precision on or off."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

from cleave.architectures.cutting.refusals import RefusalError

GRAD, INFERENCE = "grad", "inference"
DEVICES = ("cpu", "cuda")

# Names and values of what was set, such as (("grad", False),); what follows the caller's is left out.
Context = tuple[tuple[str, Any], ...]


def current() -> dict[str, Any]:
    """Return all that a context can set, as it is now."""
    state: dict[str, Any] = {GRAD: torch.is_grad_enabled(), INFERENCE: torch.is_inference_mode_enabled()}
    for device in DEVICES:
        state[device] = torch.is_autocast_enabled(device)
        state[f"{device} type"] = torch.get_autocast_dtype(device)
    return state


@contextmanager
def plainly() -> Iterator[None]:
    """Record as a training step runs: gradients on, full precision."""
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def otherwise() -> Iterator[None]:
    """Record with all of it the other way round, which tells what a forward sets from what it finds."""
    with torch.no_grad(), ExitStack() as stack:
        for device in DEVICES:
            before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            stack.callback(torch.set_autocast_dtype, device, before[1])
            stack.callback(torch.set_autocast_enabled, device, before[0])
            torch.set_autocast_enabled(device, True)
            other = torch.float16 if before[1] is torch.bfloat16 else torch.bfloat16
            torch.set_autocast_dtype(device, other)
        yield


def what_is_set(
    seen: tuple[Mapping[str, Any], Mapping[str, Any]], found: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> Context:
    """Tell what a forward has set around a step from what it found, by recording it twice.

    Args:
        seen: What held at the step, in each of the two recordings.
        found: What held when each of them began.

    Raises:
        RefusalError: The forward sets something else where it finds something else.
    """
    context = []
    for name in found[0]:
        now = tuple(each[name] for each in seen)
        if now == tuple(each[name] for each in found):
            continue
        if now[0] != now[1]:
            raise RefusalError("sets gradients or precision by what it finds them to be")
        context.append((name, now[0]))
    return tuple(context)


@contextmanager
def within(context: Context) -> Iterator[None]:
    """Open a context around a step."""
    settings = dict(context)
    with ExitStack() as stack:
        for opened in _opened(settings):
            stack.enter_context(opened)
        yield


def _opened(settings: dict[str, Any]) -> Iterator[AbstractContextManager[Any]]:
    if INFERENCE in settings:
        yield torch.inference_mode(settings[INFERENCE])
    if GRAD in settings:
        yield torch.set_grad_enabled(settings[GRAD])
    for device in DEVICES:
        if device in settings or f"{device} type" in settings:
            enabled = settings.get(device, torch.is_autocast_enabled(device))
            yield torch.autocast(device, dtype=settings.get(f"{device} type"), enabled=enabled)


def leave() -> None:
    """Mark the end of a context among the steps of a graph."""


class Switching:
    """Marks in a graph under construction where contexts begin and end.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.context: Context = ()

    def to(self, context: Context) -> None:
        """Go over to another context, if it is another one."""
        if context == self.context:
            return
        if self.context:
            self.graph.call_function(leave)
        if context:
            self.graph.call_function(within, (context,))
        self.context = context


def with_blocks(source: str) -> str:
    """Turn the marks in the source of a graph's forward into ``with`` blocks."""
    lines, indent = [], ""
    for line in source.splitlines():
        if found := re.match(r"    \w+ = (\w*_within\(.*\))(?:;|$)", line):
            lines.append(f"    with {found[1]}:")
            indent = "    "
        elif re.match(r"    \w+ = \w*_leave\(\)", line):
            indent = ""
        else:
            if line.startswith("    return "):
                indent = ""
            lines.append(indent + line)
    return "\n".join(lines) + "\n"
