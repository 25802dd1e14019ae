"""Random draws of a forward: which generators they come from, and the line that makes one which no step stands for."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch

from cleave.architectures.cutting.refusals import RefusalError, is_users, shown


class FrozenDrawError(RefusalError):
    """A draw that no step stands for; :func:`line_of_draw` finds it."""


def random_state() -> tuple[Any, ...]:
    """Return the state of every generator that a forward may draw from, to be compared."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 that which a forward draws from
    states = [torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy_state[1].tobytes(), numpy_state[2:]]
    if torch.cuda.is_initialized():
        states += [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return tuple(states)


def line_of_draw(run: Callable[[], Any]) -> str | None:
    """Run something that draws random numbers and return the line of the user's code that does."""
    before, last, found = random_state(), "", None

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal last, found
        if not is_users(frame.f_code.co_filename):
            return None
        if found is None and last and random_state() != before:
            found = last
        last = shown(frame.f_code.co_filename, frame.f_lineno)
        return watch

    outer = sys.gettrace()
    sys.settrace(watch)
    try:
        run()
    except RefusalError:
        pass
    finally:
        sys.settrace(outer)
    return found
