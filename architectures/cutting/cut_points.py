"""Where a backbone can be cut, what passes there, and what has been computed until then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from cleave.architectures.cutting.layouts import DimTracker, layout_of
from cleave.architectures.cutting.reference import Reference
from cleave.architectures.cutting.slicing import Run, fold_sizes, observe
from cleave.architectures.cutting.stages import build, check
from cleave.architectures.cutting.tracing import DEPTHS, CutError, Trace, first_line, preserved, single_crossings, trace
from cleave.architectures.macs import MacCounter, counting_macs


@dataclass(frozen=True)
class CutPoint:
    """A layer whose output alone passes from the layers before to those behind.

    Attributes:
        name: Name of the layer, the outermost one that ends with this tensor.
        shape: Shape of one sample's feature. Where samples are folded into windows or do not come first (layout
            ``other``) it is the whole shape of a batch of one.
        layout: ``NCHW``, ``NHWC`` (maps with the channels last), ``NLC`` (tokens), ``NC`` or ``other``.
        bytes: Bytes of one sample's feature in float32.
        macs: Multiply-accumulates of one sample up to and including the layer.
        params: Parameters used up to and including the layer.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    bytes: int
    macs: int
    params: int


@dataclass(frozen=True)
class Measurement:
    """What was seen of a node: shape (``None`` where its value is no tensor), layout, and the cost until then."""

    shape: tuple[int, ...] | None
    layout: str
    numel: int
    macs: int
    params: int


class Measuring(Run):
    """Runs a graph node by node on one sample and measures each; see :func:`measure`."""

    def __init__(self, backbone: nn.Module, graph: fx.Graph, channels: DimTracker, counter: MacCounter) -> None:
        super().__init__(backbone, graph=graph)
        self.channels = channels
        self.counter = counter
        self.used: dict[int, int] = {}
        self.found: dict[fx.Node, Measurement] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it returned."""
        value = super().run_node(n)
        if n.op == "placeholder":
            self.channels.start(value)
        if n.op in ("call_module", "get_attr"):
            held = self.fetch_attr(str(n.target))
            weights = held.parameters() if isinstance(held, nn.Module) else [held]
            self.used.update((id(weight), weight.numel()) for weight in weights if isinstance(weight, nn.Parameter))
        tensor = isinstance(value, Tensor)
        self.found[n] = Measurement(
            tuple(value.shape) if tensor else None,
            layout_of(value, self.channels, batch=1) if tensor else "other",
            value.numel() if tensor else 0,
            self.counter.total,
            sum(self.used.values()),
        )
        return value


def measure(backbone: nn.Module, traced: Trace, sample: Tensor) -> dict[fx.Node, Measurement]:
    """Run an eval-mode graph on one sample; return for every node its shape and layout and the cost up to it."""
    for module in backbone.modules():
        module.training = False
    with counting_macs() as counter, DimTracker() as channels:
        measuring = Measuring(backbone, traced.graph, channels, counter)
        measuring.run(sample[:1].clone())
    return measuring.found


def checked_trace(backbone: nn.Module, reference: Reference, depth: int | None = None) -> dict[bool, Trace]:
    """Trace a backbone as deep as given, or as it goes, while its graphs, run node by node, reproduce it in both modes.

    Raises:
        CutError: No depth of tracing does.
    """
    failure: Exception | None = None
    for level in reversed(DEPTHS[1:]) if depth is None else (depth,):
        try:
            traces = trace(backbone, [], level)
            for training, traced in traces.items():
                reference.check(backbone, Run(backbone, graph=traced.graph).run, training, traced.opened, learn=False)
            fold_sizes(traces, observe(traces, reference), reference.batch)
        except Exception as error:
            failure = failure or error
            continue
        return traces
    if isinstance(failure, CutError):
        raise failure
    raise CutError(f"{type(backbone).__name__} cannot be traced: {first_line(failure)}") from failure


def accepted(reference: Reference, names: Sequence[str], traces: dict[bool, Trace]) -> list[str]:
    """Return those of some names at which stages equal the backbone, all of them at once if they do."""
    try:
        check(build(reference, names, traces), reference, traces[False].opened)
    except Exception:
        half = len(names) // 2
        return [kept for part in (names[:half], names[half:]) if half for kept in accepted(reference, part, traces)]
    return list(names)


def cut_points(backbone: nn.Module, sample: Tensor) -> list[CutPoint]:
    """List every layer that a backbone can be cut after, in the order of execution.

    The whole backbone is traced in each mode, as deep as it can be, and stages cut at all candidates together are
    checked against it, as those of :func:`cut` are; nothing is traced again for one. Of several names of one tensor the
    outermost is listed, and neither identities nor the backbone's output are.

    Args:
        backbone: Network whose ``forward`` takes one tensor, a batch.
        sample: A batch (B, …) on the backbone's device, images or token ids; the first sample is measured.

    Returns:
        The points, each of which ``cut`` accepts; none where several tensors pass everywhere
        (CrossViT's two branches).

    Raises:
        CutError: The backbone cannot be traced, or does not run on the sample.
    """
    with preserved(backbone) as rewind:
        reference = Reference(backbone, sample, rewind)
        traces = checked_trace(backbone, reference)
        rewind()
        found = measure(backbone, traces[False], sample)
        names = _candidates(backbone, traces, found)
        kept = set(accepted(reference, list(names.values()), traces)) if names else set()
    points = []
    for node, name in names.items():
        seen = found[node]
        if name in kept and seen.shape is not None:
            shape = seen.shape[1:] if seen.shape[0] == 1 else seen.shape
            points.append(CutPoint(name, shape, seen.layout, 4 * seen.numel, seen.macs, seen.params))
    return points


def _candidates(
    backbone: nn.Module, traces: dict[bool, Trace], found: dict[fx.Node, Measurement]
) -> dict[fx.Node, str]:
    """Nodes behind which they alone are used, in order, each with the name of the outermost layer that ends there."""
    single = {training: _single(traced) for training, traced in traces.items()}
    names: dict[fx.Node, str] = {}
    for name, node in traces[False].outputs.items():
        in_training = traces[True].outputs.get(name)
        both = node in single[False] and in_training in single[True]
        if not both or found[node].shape is None or isinstance(backbone.get_submodule(name), nn.Identity):
            continue
        best = names.get(node)
        if best is None or name.count(".") < best.count("."):
            names[node] = name
    return {node: names[node] for node in traces[False].graph.nodes if node in names}


def _single(traced: Trace) -> set[fx.Node]:
    """Nodes that alone are used behind themselves, the output and the input left out."""
    result = traced.result
    return {node for node in single_crossings(traced) if node is not result and node is not traced.input}


def spread(points: Sequence[CutPoint], n: int, by: str = "macs") -> list[str]:
    """Choose cut points at even shares of the work.

    The i-th name is the point nearest to i / (n + 1) of what the last point has used; all together they are as near as
    distinct points in order can be (least sum of distances). Where points are equally near, as layers without MACs are
    to the one before them, the one with the fewest bytes is taken, then the first.

    Args:
        points: Cut points in order, as :func:`cut_points` lists them.
        n: How many to choose, at least 1.
        by: ``macs`` or ``params``.

    Returns:
        ``n`` distinct names in the order of execution.

    Raises:
        ValueError: ``n`` is below 1 or above the number of points, or ``by`` is unknown.
    """
    if by not in ("macs", "params"):
        raise ValueError(f"by is 'macs' or 'params', got {by!r}.")
    if not 1 <= n <= len(points):
        have = f"there are {len(points)} cut points" if points else "the backbone has no single-tensor cut point"
        raise ValueError(f"n = {n} cut points cannot be spread: {have}.")
    work = [getattr(point, by) for point in points]
    # best[j]: least (distance, bytes) of placing the shares so far on points up to j, with the points taken.
    best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())] * (len(points) + 1)
    for i in range(1, n + 1):
        target = work[-1] * i
        following: list[tuple[float, int, tuple[int, ...]]] = [(float("inf"), 0, ())]
        for j, point in enumerate(points):
            distance, size, taken = best[j]
            # In units of 1 / (n + 1), so that distances stay whole numbers and ties are exact.
            here = (distance + abs(work[j] * (n + 1) - target), size + point.bytes, (*taken, j))
            following.append(min(following[-1], here))
        best = following
    return [points[j].name for j in best[-1][2]]
