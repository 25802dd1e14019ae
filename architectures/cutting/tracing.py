"""How the graph of a backbone is read: what is opened, what stays whole, and what every node is called."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from cleave.architectures.cutting.contexts import otherwise, plainly, what_is_set
from cleave.architectures.cutting.draws import FrozenDrawError, line_of_draw, own_generators, rewinding
from cleave.architectures.cutting.patches import CHECKPOINTING
from cleave.architectures.cutting.proxies import written_by
from cleave.architectures.cutting.recording import CONSTANT, StageTracer
from cleave.architectures.cutting.refusals import CutError, RefusalError, first_line, refused, shown

__all__ = ["BATCH", "DEPTHS", "CutError", "Trace", "crossing", "first_line", "preserved", "single_crossings", "trace"]

# How deep modules are opened, tried in this order: first those that hold a cut alone, since the rest then runs as
# its author wrote it; a forward that looks at the type of what another module returns needs more of them open.
DEPTHS = (0, 1, 2, 3, 99)


# Stands for the number of samples among the values that need not pass a cut.
BATCH = object()


@dataclass(frozen=True)
class Trace:
    """A backbone's graph in one mode.

    Attributes:
        graph: Nodes in the order of execution, with one placeholder.
        outputs: The node that each called module returned; of its last call where there were several.
        returned: Type name of what a module returned where it was no single value.
        opened: Names of the modules whose forward was recorded; the backbone's own is empty.
        names: A readable, unique name of every node: ``layer1.0.conv1`` for a module kept whole, ``layer1.0/add`` for
            an operation in an opened one, with ``:2`` behind it for the second of that name; the same in both modes.
        constant: Nodes that do not depend on the input, and neither draw nor alter anything.
        kinds: Type name of each value that was seen and is no tensor.
        folds: Values that need not pass a cut, as later parts can do without: numbers, ``None``, or ``BATCH``.
    """

    graph: fx.Graph
    outputs: dict[str, fx.Node]
    returned: dict[str, str]
    opened: tuple[str, ...] = ()
    names: dict[fx.Node, str] = field(init=False)
    constant: frozenset[fx.Node] = field(init=False)
    kinds: dict[fx.Node, str] = field(init=False, default_factory=dict)
    folds: dict[fx.Node, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        seen: Counter[str] = Counter()
        names, constant, altered = {}, set(), _altered(self.graph)
        for node in self.graph.nodes:
            base = _base_name(node)
            seen[base] += 1
            names[node] = base if seen[base] == 1 else f"{base}:{seen[base]}"
            called = node.op.startswith("call") and node not in altered and not node.meta.get("draw")
            if node.op == "get_attr" or (called and all(source in constant for source in node.all_input_nodes)):
                constant.add(node)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "constant", frozenset(constant))

    @property
    def input(self) -> fx.Node:
        """The node of the input."""
        return next(iter(self.graph.nodes))

    def checkpointed(self, name: str) -> bool:
        """Say whether ``torch.utils.checkpoint`` runs a layer."""
        return name in self.outputs and self.outputs[name].target in CHECKPOINTING

    def stays(self, node: fx.Node) -> bool:
        """Say whether a node's value never passes a cut, since later parts have it without."""
        return node in self.constant or node in self.folds

    @property
    def result(self) -> Any:
        """What the backbone returns: a node, or a structure of nodes."""
        return next(reversed(self.graph.nodes)).args[0]


def _altered(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that alter a value in place, and those which that value was made by."""
    found = {node for node in graph.nodes if written_by(node) is not None}
    todo = [written for node in found if (written := written_by(node)) is not None]
    while todo:
        node = todo.pop()
        if node.op.startswith("call") and node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _base_name(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return node.op.replace("placeholder", "input")
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{path}/{operation}" if path else operation


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
        try:
            traces = {}
            for training in (True, False):
                for module in backbone.modules():
                    module.training = training
                traces[training] = _trace_twice(backbone, lambda: StageTracer(names, depth, closed))
            return traces
        except _LocatedError as failed:
            if failed.kind is None or failed.layer in StageTracer(names, 0).opened or failed.kind in closed:
                raise refused(failed.error, type(backbone).__name__, failed.layer, failed.line) from failed.error
            closed.add(failed.kind)


class _LocatedError(Exception):
    """A failure, with the layer whose forward it happened in."""

    def __init__(self, error: Exception, tracer: StageTracer, node: fx.Node | None = None, layer: str = "") -> None:
        super().__init__(str(error))
        stack = tracer.module_stack if node is None else node.meta.get("nn_module_stack") or {}
        opened = [name for name, _ in stack.values() if name in tracer.entered]
        self.error = error
        self.layer = layer or (opened[-1] if opened else "")
        self.kind = type(tracer.entered[self.layer]) if self.layer else None
        self.line = None if node is None or node.meta.get("line") is None else shown(*node.meta["line"])


def _trace_twice(backbone: nn.Module, make: Callable[[], StageTracer]) -> Trace:
    """Record a forward twice, with and without gradients, and refuse one that is not the same both times."""
    tracers, graphs, constants, attributes = (make(), make()), [], [], []
    for tracer, context in zip(tracers, (plainly, otherwise), strict=True):
        before = set(vars(backbone))
        try:
            with context():
                graphs.append(tracer.trace(backbone))
        except Exception as error:
            located = _LocatedError(error, tracer)
            if isinstance(error, FrozenDrawError):
                located.line = line_of_draw(functools.partial(make().trace, backbone), own_generators(backbone))
            raise located from error
        made = {name: value for name, value in vars(backbone).items() if name not in before and CONSTANT in name}
        for name in made:
            delattr(backbone, name)
        constants.append(made)
        attributes.append({name: dict(vars(module)) for name, module in tracer.entered.items()})
    for name, value in constants[0].items():
        setattr(backbone, name, value)
    first, second = tracers
    for node, again in zip_longest(*(graph.nodes for graph in graphs)):
        if node is None or again is None or not _same_step(node, again):
            reason = "takes another way when it is called once more, or without gradients, or in mixed precision"
            raise _LocatedError(
                RefusalError(f"{reason}, which a cut would freeze"), *((first, node) if node else (second, again))
            )
        try:
            node.meta["context"] = what_is_set((node.meta["seen"], again.meta["seen"]), (first.found, second.found))
        except RefusalError as error:
            raise _LocatedError(error, first, node) from error
        if node.op == "get_attr" and _differ(*(made.get(node.target) for made in constants)):
            user = next(iter(node.users), node)
            raise _LocatedError(
                RefusalError("uses a tensor that is another one at each call, which a cut would freeze"), first, user
            )
    for layer, now in attributes[0].items():
        for name, value in attributes[1].get(layer, {}).items():
            if name in now and _differ(now[name], value):
                changes = RefusalError(f"changes self.{name} from call to call, which a cut would freeze")
                raise _LocatedError(changes, first, layer=layer)
    return Trace(graphs[0], first.outputs, first.returned, tuple(first.entered))


def _same_step(one: fx.Node, other: fx.Node) -> bool:
    same = one.op == other.op and one.target == other.target
    return same and repr((one.args, one.kwargs)) == repr((other.args, other.kwargs))


def _differ(one: Any, other: Any) -> bool:
    """Whether two plain values or tensors differ; mixed precision makes a tensor of another type."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and not (
            one.shape == other.shape and bool(one.eq(other).logical_or(one != one).all())
        )
    plain = (int, float, str, bool, type(None))
    return isinstance(one, plain) and isinstance(other, plain) and one != other


@contextmanager
def preserved(backbone: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave a backbone and the random generators as they were: modes, attributes, gradients and buffers.

    Yields a function that rewinds them, so that two runs can be compared.
    """
    parts = [(part, dict(vars(part))) for part in backbone.modules()]
    held = [(value, value.copy()) for _, own in parts for value in own.values() if type(value) in (dict, list, set)]
    buffers = [
        (part, name, buffer, buffer.clone()) for part, _ in parts for name, buffer in part.named_buffers(recurse=False)
    ]
    devices = {tensor.device for tensor in (*backbone.parameters(), *backbone.buffers()) if tensor.is_cuda}
    generators = {device: torch.cuda.get_rng_state(device) for device in devices}
    rewind_draws = rewinding(own_generators(backbone))

    def rewind() -> None:
        for part, attributes in parts:
            made = {name: value for name, value in vars(part).items() if CONSTANT in name}
            vars(part).clear()
            vars(part).update(attributes | made)
        for container, content in held:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        rewind_draws()
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
        for part, _ in parts:
            for name in [name for name in vars(part) if CONSTANT in name]:
                delattr(part, name)
        rewind()


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
