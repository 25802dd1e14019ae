"""Patches of torch for the time of a recording, so that what a graph would lose stays whole or is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cleave.architectures.cutting.proxies import written_by
from cleave.architectures.cutting.refusals import RefusalError
from cleave.deployment.bundle.writing.functions import sets_up_apart, subclasses

if TYPE_CHECKING:
    from cleave.architectures.cutting.recording import StageTracer

CHECKPOINTING = (torch.utils.checkpoint.checkpoint, torch.utils.checkpoint.checkpoint_sequential)
CHECKPOINT_WAY_OUT = (
    "Give checkpoint a module, not a function or a method, and cut outside of it, or switch gradient checkpointing off."
)


class Whole:
    """An ``autograd.Function`` as one step of a graph, so that its own backward is kept.

    Args:
        function: The class.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        self.__module__ = function.__module__

    def __call__(self, *args: Any) -> Any:
        """Apply it."""
        return self.function.apply(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Whole) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


class Watching(TorchFunctionMode):
    """Watches what a forward computes without its input: draws are recorded, results of weights are noted.

    Args:
        tracer: What records.
    """

    def __init__(self, tracer: StageTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if any(issubclass(kind, fx.Proxy) for kind in types):
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            # Asked of torch inside an autograd.Function, gradients are always off.
            self.tracer.grad = bool(args[0])
        before = torch.get_rng_state()
        value = func(*args, **kwargs)
        if isinstance(value, Tensor) and not torch.equal(torch.get_rng_state(), before):
            torch.set_rng_state(before)
            return self.tracer.draw(func, args, kwargs)
        known = self.tracer.state.keys() | self.tracer.derived.keys()
        if any(isinstance(each, Tensor) and id(each) in known for each in tree_leaves((args, kwargs))):
            made = (each for each in tree_leaves(value) if isinstance(each, Tensor))
            self.tracer.derived.update({id(each): each for each in made if id(each) not in self.tracer.state})
        return value


@contextmanager
def functions_whole(tracer: StageTracer) -> Iterator[None]:
    """Record each ``autograd.Function`` as one step, whatever name its ``apply`` goes by."""
    with Patching() as patched:
        for function in subclasses(torch.autograd.Function):
            if "forward" in vars(function):
                patched(function, "forward", staticmethod(_standing_in(tracer, function)))
            if "setup_context" in vars(function):
                patched(function, "setup_context", staticmethod(_skipping(function.setup_context)))
        yield


class Patching:
    """Attributes of classes that are set for a while."""

    def __enter__(self) -> Callable[[type, str, Any], None]:
        self.before: list[tuple[type, str, Any]] = []
        return self._patch

    def _patch(self, owner: type, name: str, value: Any) -> None:
        self.before.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def __exit__(self, *error: object) -> None:
        for owner, name, value in reversed(self.before):
            setattr(owner, name, value)


def _standing_in(tracer: StageTracer, function: Any) -> Callable[..., Any]:
    forward, separate = function.forward, sets_up_apart(function)

    @functools.wraps(forward)
    def run(*args: Any) -> Any:
        given = args if separate else args[1:]
        if not any(isinstance(each, fx.Proxy) for each in tree_leaves(given)):
            return forward(*args)
        if function is torch.utils.checkpoint.CheckpointFunction:
            raise RefusalError("checkpoints what the cut opens", CHECKPOINT_WAY_OUT)
        return tracer.create_proxy("call_function", Whole(function), tuple(given), {})

    return run


def _skipping(setup: Callable[..., Any]) -> Callable[..., Any]:
    def run(ctx: Any, inputs: Any, output: Any) -> None:
        if not any(isinstance(each, fx.Proxy) for each in tree_leaves((inputs, output))):
            setup(ctx, inputs, output)

    return run


@contextmanager
def no_inner_checkpoint() -> Iterator[None]:
    """Refuse a checkpoint that would be taken apart, where it is not recorded as one step."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RefusalError("checkpoints what the cut opens", CHECKPOINT_WAY_OUT)

    with mock.patch.object(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", refuse):
        yield


@contextmanager
def assigned_buffers_refused() -> Iterator[None]:
    """Let ``self.count += 1`` be recorded, as it works in place, and refuse to put a new value into a buffer."""
    original = nn.Module.__setattr__

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and name in module._buffers:
            written = written_by(value.node)
            if written is not None and written.op == "get_attr" and str(written.target).rpartition(".")[2] == name:
                return
            raise RefusalError(f"puts a new value into the buffer {name!r}", f"Write self.{name}.copy_(…) instead.")
        original(module, name, value)

    with mock.patch.object(nn.Module, "__setattr__", set_attribute):
        yield
