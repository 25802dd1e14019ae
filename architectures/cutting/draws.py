"""Random draws of a forward: which generators they come from, and the line that makes one which no step stands for."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from cleave.architectures.cutting.refusals import RefusalError, is_users, shown


class FrozenDrawError(RefusalError):
    """A draw that no step stands for; :func:`line_of_draw` finds it."""


def own_generators(backbone: nn.Module) -> list[Any]:
    """List the random generators that modules keep as attributes."""
    kinds = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
    found = {id(each): each for part in backbone.modules() for each in vars(part).values() if isinstance(each, kinds)}
    return list(found.values())


def random_state(own: Sequence[Any] = ()) -> tuple[Any, ...]:
    """Return the state of every generator that a forward may draw from, to be compared.

    Args:
        own: Generators besides those of torch, Python and NumPy.
    """
    state: Any = np.random.get_state()  # noqa: NPY002 what a forward draws from
    states = [torch.get_rng_state().numpy().tobytes(), random.getstate(), (state[1].tobytes(), state[2:])]
    if torch.cuda.is_initialized():
        states += [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return (*states, *(repr(_state(each)) for each in own))


def rewinding(own: Sequence[Any]) -> Callable[[], None]:
    """Return what brings the generators of torch on the CPU, of Python and of NumPy, and others, to their state of now.

    Args:
        own: The others.
    """
    generator, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    others = [(each, _state(each)) for each in own]

    def rewind() -> None:
        torch.set_rng_state(generator)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for each, state in others:
            if isinstance(each, np.random.Generator):
                each.bit_generator.state = state
            else:
                (each.setstate if isinstance(each, random.Random) else each.set_state)(state)

    return rewind


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.get_state(legacy=True)


def line_of_draw(run: Callable[[], Any], own: Sequence[Any] = ()) -> str | None:
    """Run something that draws random numbers and return the line of the user's code that does."""
    before, last, found = random_state(own), "", None

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal last, found
        if not is_users(frame.f_code.co_filename):
            return None
        if found is None and last and random_state(own) != before:
            found = last
        last = shown(frame.f_code.co_filename, frame.f_lineno)
        return watch

    outer = sys.gettrace()
    sys.settrace(watch)
    try:
        with suppress(RefusalError):  # that there is a draw is known; its line is what is looked for
            run()
    finally:
        sys.settrace(outer)
    return found
