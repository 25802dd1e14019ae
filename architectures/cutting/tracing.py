"""How the graph of a backbone is read: what is opened, what stays whole, and what every node is called."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import fx, nn

# How deep modules are opened, tried in this order: first those that hold a cut alone, since the rest then runs as
# its author wrote it; a forward that looks at the type of what another module returns needs more of them open.
DEPTHS = (0, 1, 2, 3, 99)


# Stands for the number of samples among the values that need not pass a cut.
BATCH = object()


class CutError(ValueError):
    """A backbone cannot be taken apart as asked; the message says why, in the names of its layers."""


@dataclass(frozen=True)
class Trace:
    """A backbone's graph in one mode.

    Attributes:
        graph: Nodes in the order of execution, with one placeholder.
        outputs: The node that each called module returned; of its last call where there were several.
        returned: Type name of what a module returned where it was no single value.
        names: A readable, unique name of every node: ``layer1.0.conv1`` for a module kept whole, ``layer1.0/add`` for
            an operation in an opened one, with ``:2`` behind it for the second of that name; the same in both modes.
        constant: Nodes that do not depend on the input.
        kinds: Type name of each value that was seen and is no tensor.
        folds: Values that need not pass a cut, as later parts can do without: numbers, ``None``, or ``BATCH``.
    """

    graph: fx.Graph
    outputs: dict[str, fx.Node]
    returned: dict[str, str]
    names: dict[fx.Node, str] = field(init=False)
    constant: frozenset[fx.Node] = field(init=False)
    kinds: dict[fx.Node, str] = field(init=False, default_factory=dict)
    folds: dict[fx.Node, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        seen: Counter[str] = Counter()
        names, constant = {}, set()
        for node in self.graph.nodes:
            base = _base_name(node)
            seen[base] += 1
            names[node] = base if seen[base] == 1 else f"{base}:{seen[base]}"
            called = node.op.startswith("call")
            if node.op == "get_attr" or (called and all(source in constant for source in node.all_input_nodes)):
                constant.add(node)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "constant", frozenset(constant))

    @property
    def input(self) -> fx.Node:
        """The node of the input."""
        return next(iter(self.graph.nodes))

    def stays(self, node: fx.Node) -> bool:
        """Say whether a node's value never passes a cut, since later parts have it without."""
        return node in self.constant or node in self.folds

    @property
    def result(self) -> Any:
        """What the backbone returns: a node, or a structure of nodes."""
        return next(reversed(self.graph.nodes)).args[0]


def _base_name(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return node.op.replace("placeholder", "input")
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{path}/{operation}" if path else operation


class StageTracer(fx.Tracer):
    """Records a backbone's graph, opening a module only if a name lies inside it or it lies less deep than ``depth``.

    What timm and torchvision mark as not to be traced stays whole, and so do the layers of ``torch.nn``. Optional
    arguments of the backbone's ``forward`` keep their defaults instead of becoming inputs.
    """

    def __init__(self, names: Sequence[str], depth: int, closed: Iterable[type] = ()) -> None:
        wrapped = tuple(function for function in get_notrace_functions() if callable(function))
        super().__init__(autowrap_modules=(math, torchvision.ops), autowrap_functions=wrapped)
        self.depth = depth
        self.closed = (*get_notrace_modules(), *closed)
        self.opened = {name.rpartition(".")[0] for name in names}
        self.opened |= {path[:i] for path in self.opened for i, letter in enumerate(path) if letter == "."}
        self.outputs: dict[str, fx.Node] = {}
        self.returned: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module stays whole."""
        if module_qualified_name in self.opened:
            return False
        if type(m) in self.closed or type(m).__module__.startswith("torchvision.ops"):
            return True
        return super().is_leaf_module(m, module_qualified_name) or module_qualified_name.count(".") >= self.depth

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record which node a module returned."""
        value = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        if isinstance(value, fx.Proxy):
            self.outputs[name] = value.node
        else:
            self.returned[name] = type(value).__name__
        return value

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Give the backbone one input and leave the optional arguments out."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]


def trace(backbone: nn.Module, names: Sequence[str], depth: int) -> dict[bool, Trace]:
    """Trace a backbone in training and in eval mode, whatever the mode of its parts is now.

    A type of module whose forward cannot be traced is closed, so that it stays whole, and the rest is traced again.
    Call it inside :func:`preserved`: tracing changes modes, and leaves tensors that a forward creates on the backbone.

    Args:
        backbone: The network.
        names: Layers that must show up, so that whatever they lie in is opened.
        depth: Modules that lie less deep are opened too.

    Returns:
        The trace in training mode under ``True``, the one in eval mode under ``False``.
    """
    closed: set[type] = set()
    while True:
        traces = {}
        try:
            for training in (True, False):
                tracer = StageTracer(names, depth, closed)
                traces[training] = _trace_mode(backbone, tracer, training)
            return traces
        except Exception:
            innermost = next(reversed(tracer.module_stack.values()), ("", None))
            if innermost[0] in tracer.opened or innermost[1] is None or innermost[1] in closed:
                raise
            closed.add(innermost[1])


def _trace_mode(backbone: nn.Module, tracer: StageTracer, training: bool) -> Trace:
    for module in backbone.modules():
        module.training = training
    graph = tracer.trace(backbone)
    return Trace(graph, tracer.outputs, tracer.returned)


@contextmanager
def preserved(backbone: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave a backbone and the random generators as they were: modes, attributes and buffers.

    Yields a function that rewinds buffers and generators, so that two runs can be compared.
    """
    parts = [(part, dict(vars(part))) for part in backbone.modules()]
    buffers = [
        (part, name, buffer, buffer.clone()) for part, _ in parts for name, buffer in part.named_buffers(recurse=False)
    ]
    devices = {tensor.device for tensor in (*backbone.parameters(), *backbone.buffers()) if tensor.is_cuda}
    generators = {device: torch.cuda.get_rng_state(device) for device in devices}
    generator = torch.get_rng_state()

    def rewind() -> None:
        torch.set_rng_state(generator)
        for device, state in generators.items():
            torch.cuda.set_rng_state(state, device)
        with torch.no_grad():
            for part, name, buffer, value in buffers:
                if getattr(part, name) is not buffer:
                    setattr(part, name, buffer)
                # Batch norm's kernel does not count as a new version of its running statistics, so values are compared.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    try:
        with torch.inference_mode(False), torch.no_grad():
            yield rewind
    finally:
        rewind()
        for part, attributes in parts:
            vars(part).clear()
            vars(part).update(attributes)


def crossing(traced: Trace, node: fx.Node) -> list[fx.Node]:
    """List the nodes up to and including one whose value later nodes need, in order: what passes a cut after it."""
    position = {each: i for i, each in enumerate(traced.graph.nodes)}
    here = position[node]
    return [
        each
        for each, i in position.items()
        if i <= here and not traced.stays(each) and any(position[user] > here for user in each.users)
    ]


def single_crossings(traced: Trace) -> list[fx.Node]:
    """List the nodes behind which nothing but they themselves is used: all single-tensor cuts, in one pass."""
    order = list(traced.graph.nodes)
    position = {node: i for i, node in enumerate(order)}
    live: set[fx.Node] = set()
    ends: dict[int, list[fx.Node]] = {}
    found = []
    for i, node in enumerate(order):
        live.difference_update(ends.pop(i, ()))
        if not traced.stays(node) and node.users:
            live.add(node)
            ends.setdefault(max(position[user] for user in node.users), []).append(node)
            if live == {node}:
                found.append(node)
    return found


def first_line(error: Exception | None) -> str:
    """Name an error's type and cause in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
