"""Parts of a traced backbone as modules."""

from __future__ import annotations

import hashlib
import importlib
import linecache
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from cleave.architectures.cutting.contexts import Switching, with_blocks, within
from cleave.architectures.cutting.proxies import written_by
from cleave.architectures.cutting.reference import Reference
from cleave.architectures.cutting.refusals import WAY_OUT
from cleave.architectures.cutting.tracing import BATCH, CutError, Trace


@dataclass(frozen=True)
class Slice:
    """One part of a graph.

    Attributes:
        graph: The part.
        inputs: The nodes of the whole whose values it takes from earlier parts.
        outputs: The nodes whose values it gives to later ones.
        sized: Whether sizes that follow from the input's are written into it as numbers.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    sized: bool


def slice_graph(trace: Trace, part_of: Mapping[fx.Node, int], count: int) -> list[Slice]:
    """Take a graph apart.

    Args:
        trace: The backbone in one mode.
        part_of: The part, from 0 to ``count - 1``, of every node that depends on the input; the others are computed
            anew in each part that uses them.
        count: Number of parts. The last one returns what the backbone returns.

    Returns:
        One slice a part. A part returns one value alone, several as a tuple.

    Raises:
        CutError: A part needs what a later one computes.
    """
    order = [node for node in trace.graph.nodes if node not in trace.constant and node.op != "output"]
    end = next(reversed(trace.graph.nodes))
    where = {**part_of, end: count - 1}
    used_in: dict[fx.Node, set[int]] = {}
    for node in order:
        used_in[node] = {where[user] for user in node.users if node not in trace.folds or where[user] == where[node]}
        first = min(used_in[node], default=count)
        if first < where.get(node, 0):
            user = next(user for user in node.users if where[user] == first)
            raise CutError(
                f"{trace.names[user]!r} in part {first} needs {trace.names[node]!r} of the later part {where[node]}."
            )
    _check_state(trace, where)
    slices = []
    for part in range(count):
        inputs = tuple(node for node in order if part in used_in[node] and where.get(node, -1) < part)
        members = [node for node in order if where.get(node) == part]
        outputs = tuple(node for node in members if max(used_in[node], default=part) > part)
        slices.append(_copy_nodes(trace, members, inputs, outputs, last=part == count - 1))
    return slices


def _check_state(trace: Trace, where: Mapping[fx.Node, int]) -> None:
    """Refuse a parameter or buffer that one part alters and another reads: they may run on two machines."""
    for node in trace.graph.nodes:
        if (written := written_by(node)) is None or node not in where:
            continue
        sources, readers = [written], {where[node]}
        while sources:
            source = sources.pop()
            if source.op == "get_attr":
                readers |= {where[user] for user in source.users if user in where}
            elif source in trace.constant or not source.all_input_nodes:
                sources.extend(source.all_input_nodes)
        if len(readers) > 1:
            raise CutError(
                f"{trace.names[node]!r} alters a parameter or buffer that another part reads. Keep in one place what "
                f"reads and what alters it. {WAY_OUT}"
            )


def _copy_nodes(
    trace: Trace, members: list[fx.Node], inputs: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...], *, last: bool
) -> Slice:
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {node: graph.placeholder(node.name) for node in inputs}
    own, switching = set(members), Switching(graph)
    sized = False

    def copy(node: fx.Node) -> Any:
        nonlocal sized
        if node in copies:
            return copies[node]
        if node in own or node in trace.constant:
            for source in node.all_input_nodes:
                copy(source)
            if node.op != "get_attr":
                switching.to(node.meta.get("context", ()))
            copies[node] = graph.node_copy(node, copy)
            # Its source would have fx wrap the function in every later trace of this process.
            copies[node].meta.pop("is_wrapped", None)
        elif trace.folds[node] is BATCH:
            copies[node] = graph.call_method("size", (copies[inputs[0]], 0))
        else:
            copies[node] = trace.folds[node]
            sized = sized or copies[node] is not None
        return copies[node]

    for node in members:
        copy(node)
    switching.to(())
    result = trace.result if last else outputs[0] if len(outputs) == 1 else outputs
    graph.output(fx.map_arg(result, copy))
    graph.lint()
    return Slice(graph, inputs, outputs, sized)


class Program:
    """The Python source of a graph's forward with the names it uses; unlike a graph it survives copy and pickle."""

    def __init__(self, graph: fx.Graph) -> None:
        code = graph.python_code("self")
        self.source = with_blocks(code.src)
        self.globals = dict(code.globals)
        self.build()

    def build(self) -> None:
        """Compile the source; tracebacks show its lines."""
        name = f"<stage {hashlib.sha256(self.source.encode()).hexdigest()[:16]}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        namespace = dict(self.globals)
        exec(compile(self.source, name, "exec", dont_inherit=True), namespace)
        self.forward = namespace["forward"]

    def __getstate__(self) -> dict[str, Any]:
        modules = {name: value.__name__ for name, value in self.globals.items() if isinstance(value, types.ModuleType)}
        others = {name: value for name, value in self.globals.items() if name not in modules}
        return {"source": self.source, "modules": modules, "others": others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {name: importlib.import_module(value) for name, value in state["modules"].items()}
        self.source = state["source"]
        self.globals = {**modules, **state["others"]}
        self.build()


class Stage(nn.Module):
    """A part of a backbone, with a forward for training and one for eval mode.

    Its parameters and buffers are those of the backbone, not copies, under the names they have there. The mode of the
    stage decides which forward runs, as the backbone's own would; layers that were kept whole follow their own.
    """

    def __init__(self, backbone: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
        super().__init__()
        targets = {
            str(node.target)
            for graph in graphs.values()
            for node in graph.nodes
            if node.op in ("get_attr", "call_module")
        }
        for target in sorted(targets, key=lambda target: (target.count("."), target)):
            _share(backbone, self, target)
        self._programs = {training: Program(graph) for training, graph in graphs.items()}
        self.training = backbone.training

    def forward(self, *values: Any) -> Any:
        """Run the part on what it takes from earlier ones."""
        return self._programs[self.training].forward(self, *values)


def _share(source: nn.Module, target: nn.Module, name: str) -> None:
    """Install what ``name`` stands for in one module at the same place of another."""
    *path, last = name.split(".")
    for step in path:
        child = getattr(source, step)
        own = getattr(target, step, None)
        if own is child:
            return  # a layer above was installed whole
        if own is None:
            own = nn.Module()
            target.add_module(step, own)
        source, target = child, own
    value = getattr(source, last)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        # A tensor that is no buffer in the backbone must move with the stage, and has no place in its state dict.
        target.register_buffer(last, value, persistent=last in source.state_dict())
    else:
        setattr(target, last, value)


def follow_modes(stages: nn.Module, backbone: nn.Module) -> None:
    """Set every stage, and every module in it, to the mode of its namesake in the backbone."""
    stages.training = backbone.training
    for stage in stages.children():
        for name, module in stage.named_modules():
            module.training = backbone.get_submodule(name).training


class Run(fx.Interpreter):
    """Runs a graph node by node, each under the context that was recorded of it."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        with within(n.meta.get("context", ())):
            return super().run_node(n)


class Observing(Run):
    """Runs a graph node by node and keeps the values that are no tensors."""

    def __init__(self, backbone: nn.Module, traced: Trace) -> None:
        super().__init__(backbone, graph=traced.graph)
        self.traced = traced
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.op.startswith("call") and n not in self.traced.constant and not isinstance(value, Tensor):
            self.values[self.traced.names[n]] = value
            self.traced.kinds[n] = type(value).__name__
        return value


def observe(traces: Mapping[bool, Trace], reference: Reference) -> dict[bool, dict[str, Any]]:
    """Run the graphs of both modes and return by the nodes' names the values that are no tensors."""
    values = {}
    for training, traced in traces.items():
        observing = Observing(reference.backbone, traced)
        reference.observe(observing.run, training)
        values[training] = observing.values
    return values


def fold_sizes(traces: Mapping[bool, Trace], values: Mapping[bool, dict[str, Any]], batch: Mapping[bool, int]) -> None:
    """Note which values need not pass a cut: nothing, the batch size, and what follows from the input's size alone.

    Many forwards read ``B, C, H, W = x.shape`` at the start and use it to the end; a mask that is built on demand
    (NaFlexViT) is recorded like a tensor even where there is none. The two modes saw different batch sizes.

    Args:
        traces: The backbone in both modes.
        values: What :func:`observe` saw in each.
        batch: Number of samples that each saw.
    """
    for training, traced in traces.items():
        for node, name in traced.names.items():
            here, there = values[training].get(name, BATCH), values[not training].get(name, BATCH)
            if here is None or (_plain(here) and type(here) is type(there) and here == there):
                traced.folds[node] = here
            elif (here, there) == (batch[training], batch[not training]):
                traced.folds[node] = BATCH


def _plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(_plain(item) for item in value)
    return isinstance(value, int | float)


def check_size(inputs: Tensor, expected: tuple[int, ...] | None) -> None:
    """Refuse inputs of another size than that which was written into the parts.

    Raises:
        CutError: The shape differs from ``expected``, unless that is ``None``.
    """
    if expected is not None and tuple(inputs.shape[1:]) != expected:
        raise CutError(
            f"the network was cut for inputs of shape {expected}, from which it computes sizes that pass the cuts; got "
            f"{tuple(inputs.shape[1:])}. Cut it again with a sample of that shape."
        )
