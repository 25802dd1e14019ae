"""The general form of a cut: a backbone as a graph for planners, node by node, and as parts that pass named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from cleave.architectures.cutting.contexts import within
from cleave.architectures.cutting.cut_points import Measurement, checked_trace, measure
from cleave.architectures.cutting.reference import Reference
from cleave.architectures.cutting.slicing import Run, Slice, Stage, check_size, follow_modes, slice_graph
from cleave.architectures.cutting.tracing import CutError, Trace, preserved
from cleave.architectures.naming import did_you_mean

INPUT = "input"


@dataclass(frozen=True)
class GraphNode:
    """One step of a backbone: a layer kept whole, or an operation between layers.

    Attributes:
        name: ``layer1.0.conv1`` for a layer, ``layer1.0/add`` for an operation in the forward of ``layer1.0``, with
            ``:2`` behind it for the second of that name.
        inputs: Names of the nodes whose values it takes; ``input`` is the batch.
        shape: Shape of its value for a batch of one, ``None`` where that is no tensor (a size, a list of tensors).
        bytes: Bytes of its value for one sample in float32; 0 where it is no tensor.
        macs: Its own multiply-accumulates for one sample.
        params: Its own parameters; shared ones count where they are used first.
        kind: What it is: the class of a layer (``Conv2d``) or the name of an operation (``add``).
        layer: Outermost layer that ends with its value, by which ``cut`` calls it; empty where none does.
        crosses: How its value gets from one part to another: ``tensor``, it is sent; ``folded``, each part has it
            without (a number that follows from the input's size, or the batch size); ``never``, it is a tuple, a list
            or a whole shape, which is neither, so that what reads it runs in the same part.
    """

    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None
    bytes: int
    macs: int
    params: int
    kind: str = ""
    layer: str = ""
    crosses: Literal["tensor", "folded", "never"] = "tensor"


@dataclass(frozen=True)
class NodeGraph:
    """A backbone's nodes in the order of execution; what does not depend on the input belongs to no node.

    Attributes:
        nodes: All nodes; every part of a partition is a set of their names.
        outputs: Names of the nodes that the backbone returns.
        input_shape: Per-sample shape of the images.
    """

    nodes: tuple[GraphNode, ...]
    outputs: tuple[str, ...]
    input_shape: tuple[int, ...] = ()

    @property
    def input_values(self) -> int:
        """Numbers in one sample of the input; 0 where its shape is not known."""
        return math.prod(self.input_shape) if self.input_shape else 0

    def edges(self) -> list[tuple[str, str, int]]:
        """List (producer, consumer, bytes of one sample's value in float32); the images come from ``input``."""
        size = {INPUT: 4 * self.input_values} | {node.name: node.bytes for node in self.nodes}
        return [(source, node.name, size[source]) for node in self.nodes for source in node.inputs]


class Partition(nn.Module):
    """A backbone in parts that pass named tensors, made by :func:`partition`: children ``part0`` to ``partN``.

    Part ``i`` takes the values ``inputs[i]`` in that order and returns the values ``outputs[i]``: one alone, several as
    a tuple. The last part returns what the backbone returns.

    Attributes:
        inputs: For every part the names of the values it takes; ``input`` is the batch.
        outputs: For every part but the last the names of the values that later parts take.
        input_shape: Per-sample shape of the input it is bound to, where sizes that the backbone computes from it
            would pass between parts; ``None`` where it is bound to none.
    """

    def __init__(
        self, parts: Sequence[nn.Module], inputs: Sequence[tuple[str, ...]], outputs: Sequence[tuple[str, ...]]
    ):
        super().__init__()
        for i, part in enumerate(parts):
            self.add_module(f"part{i}", part)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.input_shape: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Any:
        """Run all parts in order: what the backbone returns for a batch (B, …)."""
        return self.run(x)

    def run(self, x: Tensor, *, isolated: bool = False) -> Any:
        """Run all parts; ``isolated`` gives each its own copy of what it takes, as if they ran on several machines."""
        check_size(x, self.input_shape)
        values: dict[str, Any] = {INPUT: x}
        result: Any = x
        for part, inputs, outputs in zip(self.children(), self.inputs, (*self.outputs, ()), strict=True):
            taken = [values[name].clone() if isolated else values[name] for name in inputs]
            result = part(*taken)
            values.update(zip(outputs, result if len(outputs) > 1 else (result,), strict=False))
        return result


def trace_graph(backbone: nn.Module, sample: Tensor, depth: int | None = None) -> NodeGraph:
    """Read a backbone's graph with what every node costs and sends, for a planner to divide.

    Args:
        backbone: Network whose ``forward`` takes one tensor, a batch.
        sample: Images (B, C, H, W) on the backbone's device; the first one is measured.
        depth: 0 keeps the backbone's children whole, 1 opens them, 2 opens what they hold, and so on; ``None`` opens
            all that can be.

    Returns:
        The graph in eval mode. Steps that happen in training only (masks of drop-path) go with the nodes they serve.

    Raises:
        CutError: The backbone cannot be traced at this depth, or does not run on the sample.
    """
    with preserved(backbone) as rewind:
        traced = checked_trace(backbone, Reference(backbone, sample, rewind), depth)[False]
        rewind()
        found = measure(backbone, traced, sample)
    nodes, macs, params = [], 0, 0
    ends = _layer_ends(backbone, traced)
    for node in _movable(traced):
        now = found[node]
        inputs = tuple(traced.names[source] for source in node.all_input_nodes if source not in traced.constant)
        own = (now.macs - macs, now.params - params, kind_of(backbone, node), ends.get(node, ""))
        nodes.append(GraphNode(traced.names[node], inputs, now.shape, 4 * now.numel, *own, _crosses(traced, node, now)))
        macs, params = now.macs, now.params
    end = next(reversed(traced.graph.nodes))
    outputs = tuple(traced.names[node] for node in end.all_input_nodes)
    return NodeGraph(tuple(nodes), outputs, tuple(sample.shape[1:]))


def kind_of(backbone: nn.Module, node: fx.Node) -> str:
    """Return the class of a node's layer, or the name of its operation."""
    if node.op == "call_module":
        return type(backbone.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def visit_nodes(
    backbone: nn.Module, sample: Tensor, visit: Callable[[str, Callable[[], Any]], None], depth: int | None = None
) -> None:
    """Run a backbone's graph in eval mode and show each of its nodes as a call that can be repeated.

    Args:
        backbone: Network whose ``forward`` takes one tensor, a batch.
        sample: A batch (B, …) on the backbone's device.
        visit: Takes a node's name as :func:`trace_graph` lists it, and a call that computes it from its inputs. What a
            call alters in place is a copy.
        depth: As given to :func:`trace_graph`.

    Raises:
        CutError: The backbone cannot be traced at this depth, or does not run on the sample.
    """
    with preserved(backbone) as rewind:
        traced = checked_trace(backbone, Reference(backbone, sample[:1], rewind), depth)[False]
        rewind()
        for module in backbone.modules():
            module.training = False
        with torch.no_grad():
            _Visiting(backbone, traced, visit).run(sample.clone())


def partition(
    backbone: nn.Module, node_sets: Sequence[Collection[str]], sample: Tensor, depth: int | None = None
) -> Partition:
    """Divide a backbone into parts by sets of nodes; ``cut`` is its one-tensor front.

    Parts share parameters and buffers with the backbone and name them as it does. They are checked against it on the
    sample in both modes, sharing tensors and isolated from each other: results and buffers must be equal in every bit.

    Args:
        backbone: Network whose ``forward`` takes one tensor, a batch.
        node_sets: For every part the names of its nodes as :func:`trace_graph` lists them. Together they hold each node
            once, and a part takes values from earlier parts only.
        sample: Images (B, C, H, W) on the backbone's device; one is enough.
        depth: As given to :func:`trace_graph`.

    Returns:
        The parts, in the backbone's modes.

    Raises:
        CutError: A node is unknown, missing or in two sets; a set is empty or needs what a later one computes; what
            passes between parts is no tensor; the backbone cannot be traced, or does not run on the sample.
    """
    with preserved(backbone) as rewind:
        reference = Reference(backbone, sample, rewind)
        traces = checked_trace(backbone, reference, depth)
        part_of = _assign(node_sets, traces[False])
        rewind()
        found = measure(backbone, traces[False], sample)
        slices = {training: _slice(traced, part_of, len(node_sets)) for training, traced in traces.items()}
        _check_tensors(slices[False], traces[False], found)
        inputs, outputs = _interface(slices, traces)
        parts = [
            Stage(backbone, {training: some[i].graph for training, some in slices.items()})
            for i in range(len(node_sets))
        ]
        network = Partition(parts, inputs, outputs)
        if any(part.sized for some in slices.values() for part in some):
            network.input_shape = tuple(sample.shape[1:])
        for training in (False, True):
            reference.check(network, network.run, training)
            reference.check(network, lambda x: network.run(x, isolated=True), training)
    follow_modes(network, backbone)
    return network


def _layer_ends(backbone: nn.Module, traced: Trace) -> dict[fx.Node, str]:
    """Return the outermost layer that ends with each node; an identity ends with what stands before it."""
    found: dict[fx.Node, str] = {}
    for name, node in traced.outputs.items():
        if not isinstance(backbone.get_submodule(name), nn.Identity):
            found[node] = min(found.get(node, name), name, key=lambda each: each.count("."))
    return found


def _crosses(traced: Trace, node: fx.Node, measured: Measurement) -> Literal["tensor", "folded", "never"]:
    if measured.shape is not None:
        return "tensor"
    return "folded" if node in traced.folds else "never"


def _movable(traced: Trace) -> list[fx.Node]:
    return [n for n in traced.graph.nodes if n not in traced.constant and n.op not in ("placeholder", "output")]


def _assign(node_sets: Sequence[Collection[str]], traced: Trace) -> dict[str, int]:
    known = [traced.names[node] for node in _movable(traced)]
    part_of: dict[str, int] = {}
    for part, names in enumerate(node_sets):
        if isinstance(names, str) or not names:
            raise CutError(f"part {part} is a set of node names and not empty; got {names!r}.")
        for name in names:
            if name not in known:
                raise CutError(f"part {part} names the unknown node {name!r}.{did_you_mean(name, known)}")
            if part_of.setdefault(name, part) != part:
                raise CutError(f"node {name!r} is in part {part_of[name]} and in part {part}.")
    missing = [name for name in known if name not in part_of]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CutError(f"no part holds {', '.join(map(repr, missing[:5]))}{more}; the sets must cover every node.")
    return part_of


def _slice(traced: Trace, part_of: dict[str, int], count: int) -> list[Slice]:
    where = {node: part_of[name] for node in _movable(traced) if (name := traced.names[node]) in part_of}
    extra = [node for node in _movable(traced) if node not in where]
    # A step of training alone goes to the first part that uses it: there its own input arrives in both modes. One that
    # nothing uses works in place (drop-path scales its mask) and goes where its operands are.
    for node in reversed(extra):
        if served := [where[user] for user in node.users if user in where]:
            where[node] = min(served)
    for node in extra:
        where.setdefault(node, max((where[source] for source in node.all_input_nodes if source in where), default=0))
    return slice_graph(traced, where, count)


def _check_tensors(slices: Sequence[Slice], traced: Trace, found: dict[fx.Node, Measurement]) -> None:
    for part, cut_out in enumerate(slices):
        for node in cut_out.outputs:
            if found[node].shape is None:
                raise CutError(
                    f"part {part} would pass on {traced.names[node]!r}, which is no tensor: keep it in one part with "
                    f"{', '.join(repr(traced.names[user]) for user in node.users)}."
                )


def _interface(
    slices: dict[bool, list[Slice]], traces: dict[bool, Trace]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    def names(training: bool) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        known = traces[training].names
        inputs = [tuple(known[node] for node in part.inputs) for part in slices[training]]
        return inputs, [tuple(known[node] for node in part.outputs) for part in slices[training][:-1]]

    if names(True) != names(False):
        differing = {n for side in names(True) for part in side for n in part}
        differing ^= {n for side in names(False) for part in side for n in part}
        raise CutError(f"parts would pass other values in training than in eval mode: {', '.join(sorted(differing))}.")
    return names(False)


class _Visiting(Run):
    """Runs a graph and shows each node before its value goes on."""

    def __init__(self, backbone: nn.Module, traced: Trace, visit: Callable[[str, Callable[[], Any]], None]) -> None:
        super().__init__(backbone, graph=traced.graph)
        self.traced, self.visit = traced, visit

    def run_node(self, n: fx.Node) -> Any:
        """Show a node, then run it."""
        if n.op.startswith("call") and n not in self.traced.constant:
            args, kwargs = tree_map(_copied, self.fetch_args_kwargs_from_env(n))
            call = getattr(self, n.op)

            def compute() -> Any:
                with within(n.meta.get("context", ())):
                    return call(n.target, args, kwargs)

            self.visit(self.traced.names[n], compute)
        return super().run_node(n)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value
