"""Functions with a backward of their own, as the plain operations of their forward while a module is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function

_DEFAULT_SETUP = Function.setup_context


class Context:
    """What a forward writes down for a backward that never comes."""

    needs_input_grad = (False,) * 256

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep nothing."""

    save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_backward


@contextmanager
def inlined() -> Iterator[None]:
    """Let ``apply`` run the forward alone: TorchScript cannot store a call into Python.

    A function is found where it is called as ``Function.apply``; under another name it stays a call, and saving fails.
    """
    before = [(each, vars(each).get("apply")) for each in subclasses(Function)]
    for function, _ in before:
        function.apply = classmethod(_forward)
    try:
        yield
    finally:
        for function, apply in before:
            if apply is None:
                del function.apply
            else:
                function.apply = apply


def subclasses(base: Any) -> Iterator[Any]:
    """List all subclasses."""
    for each in base.__subclasses__():
        yield each
        yield from subclasses(each)


def sets_up_apart(function: Any) -> bool:
    """Whether a function's context is set up beside its forward, which then takes none."""
    return function.setup_context is not _DEFAULT_SETUP


def _forward(function: Any, *args: Any) -> Any:
    return function.forward(*args) if sets_up_apart(function) else function.forward(Context(), *args)
