"""Numbers that stopped being numbers, and what to say of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

DIVERGED = (
    "the network has diverged; go back to a checkpoint of before, and train with a lower training.optimizer.lr or "
    "with trainer.gradient_clip_val=1"
)
DEAD = (
    "its encoder is dead, so that nothing of the input is sent; train it again, with a lower training.optimizer.lr, "
    "another seed or another encoder"
)


class NumberError(ValueError):
    """NaN, infinity, or one value throughout where numbers should be that say something."""


@contextmanager
def named(place: str) -> Iterator[None]:
    """Name the place in what a :class:`NumberError` raised within says; without a place it stays as it is."""
    try:
        yield
    except NumberError as error:
        if not place:
            raise
        raise NumberError(f"{place}: {error}") from error


def check_finite(values: Tensor, what: str) -> None:
    """Raise :class:`NumberError` where a tensor holds NaN or infinity; ``what`` says what it is."""
    if not values.isfinite().all():
        raise NumberError(f"{what} holds NaN or infinity: {DIVERGED}")


def not_finite(state: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """Return which of some tensors hold NaN or infinity, in order."""
    chosen = [(name, state[name]) for name in names if name in state and state[name].is_floating_point()]
    flags = [values.isfinite().all() for _, values in chosen]
    if not flags or torch.stack([flag.to(flags[0].device) for flag in flags]).all():  # one wait for the device
        return []
    return [name for (name, _), flag in zip(chosen, flags, strict=True) if not flag]


def learned_names(module: nn.Module) -> list[str]:
    """Return the names in a module's state of what learns: weights, running statistics, and ranges of codes.

    Other buffers may hold infinity by right, such as the mask of an attention.
    """
    learned: list[Tensor] = list(module.parameters())
    for part in module.modules():
        if isinstance(part, _NormBase) or hasattr(type(part), "fixed_range"):
            learned += part.buffers(recurse=False)
    known = set(map(id, learned))
    # A network names in its state what its modules call otherwise.
    return [name for name, value in module.state_dict(keep_vars=True).items() if id(value) in known]


def check_learned(module: nn.Module, what: str) -> None:
    """Raise :class:`NumberError` where a module has learned NaN or infinity; ``what`` says what it is."""
    if broken := not_finite(module.state_dict(), learned_names(module)):
        raise NumberError(f"{what} holds NaN or infinity in {few(broken)}: {DIVERGED}")


def few(names: list[str]) -> str:
    """Return the first of some names for a person."""
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
