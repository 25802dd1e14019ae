"""A recorder of a backbone's forward: what it opens, what it keeps whole, and what a recording would lose."""

from __future__ import annotations

import itertools
import linecache
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
import torchvision
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.overrides import is_tensor_method_or_property
from torch.utils._pytree import tree_leaves

from cleave.architectures.cutting.contexts import GRAD, current
from cleave.architectures.cutting.draws import FrozenDrawError, own_generators, random_state
from cleave.architectures.cutting.patches import (
    CHECKPOINT_WAY_OUT,
    CHECKPOINTING,
    Watching,
    assigned_buffers_refused,
    functions_whole,
    no_inner_checkpoint,
)
from cleave.architectures.cutting.proxies import StageProxy, StateProxy, origin, written_by
from cleave.architectures.cutting.refusals import WAY_OUT, RefusalError, is_users

CONSTANT = "_tensor_constant"


class StageTracer(fx.Tracer):
    """Records a backbone's graph, opening a module only if a name lies inside it or it lies less deep than ``depth``.

    What timm and torchvision mark as not to be traced stays whole, and so do the layers of ``torch.nn``, modules with
    hooks or a ``train`` of their own, functions with a backward of their own, and modules under
    ``torch.utils.checkpoint``. Optional arguments of the backbone's ``forward`` keep their defaults instead of becoming
    inputs. Each step notes its line and what holds around it: gradients, precision.
    """

    def __init__(self, names: Sequence[str], depth: int, closed: Iterable[type] = ()) -> None:
        wrapped = tuple(function for function in get_notrace_functions() if callable(function))
        super().__init__(
            autowrap_modules=(math, torchvision.ops, torch.utils.checkpoint),
            autowrap_functions=(*wrapped, *CHECKPOINTING),
        )
        self.depth = depth
        self.closed = (*get_notrace_modules(), *closed)
        self.opened = {name.rpartition(".")[0] for name in names}
        self.opened |= {path[:i] for path in self.opened for i, letter in enumerate(path) if letter == "."}
        self.outputs: dict[str, fx.Node] = {}
        self.returned: dict[str, str] = {}
        self.entered: dict[str, nn.Module] = {}
        self.found: dict[str, Any] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Record a backbone's forward, in the mode and under the context that hold now."""
        self.state: dict[int, str] = {}
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self.state.setdefault(id(tensor), name)
        self.derived: dict[int, Tensor] = {}
        self.generators = own_generators(root)
        self.entered[""] = root
        self.found, self.grad = current(), torch.is_grad_enabled()
        self._refuse_lost("", root)
        with functions_whole(self), Watching(self), no_inner_checkpoint(), assigned_buffers_refused():
            before = random_state(self.generators)
            graph = super().trace(root, concrete_args)
            self._refuse_draws(before)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module stays whole."""
        if module_qualified_name in self.opened:
            return False
        if type(m) in self.closed or type(m).__module__.startswith("torchvision.ops") or lost_by_opening(m):
            return True
        return super().is_leaf_module(m, module_qualified_name) or module_qualified_name.count(".") >= self.depth

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record which node a module returned."""
        name = self.path_of_module(m)
        opened = not self.is_leaf_module(m, name)
        if opened:
            self.entered[name] = m
            before = random_state(self.generators)
            forward = self._checked(name, m, forward, before)
        value = super().call_module(m, forward, args, kwargs)
        if isinstance(value, fx.Proxy):
            self.outputs[name] = value.node
        else:
            self.returned[name] = type(value).__name__
        return value

    def _checked(self, name: str, m: nn.Module, forward: Callable[..., Any], before: tuple[Any, ...]) -> Any:
        # Within super().call_module, so that what is raised is found to be this module's.
        def run(*args: Any, **kwargs: Any) -> Any:
            self._refuse_lost(name, m)
            value = forward(*args, **kwargs)
            self._refuse_draws(before)
            return value

        return run

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Give the backbone one input and leave the optional arguments out."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *more: Any, **options: Any
    ) -> fx.Proxy:
        """Record a step."""
        if target in CHECKPOINTING and not any(isinstance(each, nn.Module) for each in tree_leaves(args[0])):
            raise RefusalError("checkpoints a function", CHECKPOINT_WAY_OUT)
        return super().create_proxy(kind, target, args, kwargs, *more, **options)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        """Note the line of a step and what holds around it."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if any(source.graph is not self.graph for source in node.all_input_nodes):
            raise RefusalError(
                "uses what an earlier call has left behind", "Keep no tensors from one call for the next."
            )
        node.meta["line"], node.meta["seen"] = user_line(), current() | {GRAD: self.grad}
        if target in CHECKPOINTING:
            self._note_checkpoint(node)
        if (written := written_by(node)) is not None and str(written.target).startswith(CONSTANT):
            raise RefusalError(
                "writes into a tensor that does not come from the input",
                "Make it from the input, as with x.new_zeros(len(x), 8), or put that code into a module of its own.",
            )
        return node

    def create_arg(self, a: Any) -> Any:
        """Turn an argument into one of a graph's; refuse what was computed from weights out of sight."""
        if isinstance(a, Tensor) and id(a) in self.derived:
            raise RefusalError(
                "uses what was computed from parameters or buffers out of sight, which a cut would freeze",
                "Take them by their names, as in self.weight.",
            )
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record where a forward takes a parameter or a buffer."""
        name = self.state.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            node = self.create_node("get_attr", name, (), {})
            parameter_proxy_cache[name] = StateProxy(node, self, attr_val)
        return parameter_proxy_cache[name]

    def get_fresh_qualname(self, prefix: str) -> str:
        """Name a constant; the same in two recordings of one forward."""
        return next(name for i in itertools.count() if not hasattr(self.root, name := f"{prefix}{i}"))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Stand for a step's value."""
        return StageProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse a branch on a value."""
        line = user_line()
        if line is not None and re.search(r"\bassert\b", linecache.getline(*line)):
            raise RefusalError("asserts something of a tensor", f"Write torch._assert(condition, message). {WAY_OUT}")
        raise RefusalError(f"branches on {origin(obj.node)}, which a cut would freeze")

    def draw(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        """Record a random draw that takes nothing from the input."""
        if is_tensor_method_or_property(func):
            proxy = self.create_proxy("call_method", func.__name__, args, kwargs)
        else:
            proxy = self.create_proxy("call_function", func, args, kwargs)
        proxy.node.meta["draw"] = True
        return proxy

    def _note_checkpoint(self, node: fx.Node) -> None:
        held = [
            each for each in node.all_input_nodes if each.op == "get_attr" and each.target not in self.state.values()
        ]
        for each in held:
            self.outputs[str(each.target)] = node

    def _refuse_lost(self, name: str, module: nn.Module) -> None:
        if lost := lost_by_opening(module):
            place = f", or cut outside of {name!r}" if name else ""
            raise RefusalError(
                f"has {lost}, which would no longer run",
                f"Remove it before cutting, put it on a layer that no cut lies in{place}.",
            )

    def _refuse_draws(self, before: tuple[Any, ...]) -> None:
        if random_state(self.generators) != before:
            raise FrozenDrawError("draws random numbers in a way that no step stands for, and a cut would freeze them")


def lost_by_opening(module: nn.Module) -> str | None:
    """Name what a module does besides its forward, which would be lost if that alone were recorded."""
    kinds = {
        "_forward_pre_hooks": "a forward pre-hook",
        "_forward_hooks": "a forward hook",
        "_backward_pre_hooks": "a backward pre-hook",
        "_backward_hooks": "a backward hook",
    }
    found = next((words for kind, words in kinds.items() if getattr(module, kind)), None)
    # It keeps layers in eval mode, and stages would train them.
    return found or ("a train() of its own" if type(module).train is not nn.Module.train else None)


def user_line() -> tuple[str, int] | None:
    """Return the file and number of the line of the user's code that runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None
