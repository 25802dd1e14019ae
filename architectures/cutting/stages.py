"""Cutting a backbone into stages: the one place where a network is taken apart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from cleave.architectures.cutting.layouts import DimTracker, layout_of
from cleave.architectures.cutting.patches import CHECKPOINT_WAY_OUT
from cleave.architectures.cutting.reference import Reference
from cleave.architectures.cutting.slicing import (
    Slice,
    Stage,
    check_size,
    fold_sizes,
    follow_modes,
    observe,
    slice_graph,
)
from cleave.architectures.cutting.tracing import DEPTHS, CutError, Trace, crossing, first_line, preserved, trace
from cleave.architectures.naming import did_you_mean

LOGITS = "logits"
"""The name by which :meth:`Stages.features` knows the network's output."""


class CrossingError(CutError):
    """Several tensors cross a cut in a graph that reproduces the backbone."""


class Stages(nn.Module):
    """A backbone in runs of consecutive layers, made by :func:`cut`: children ``stage0`` to ``stageN``.

    ``stages[i]`` ends with the layer ``names[i]``; the last stage ends with the backbone's output. It is a module like
    any other: it can be copied, pickled, moved, trained and compiled.

    Attributes:
        names: The cut names in the order of execution.
        layouts: Layout of each cut's feature: ``NCHW``, ``NHWC``, ``NLC``, ``NC`` or ``other``.
        input_shape: Per-sample shape of the input it is bound to, where sizes that the backbone computes from it
            would pass a cut (XCiT, MViT); ``None`` where it is bound to none.
        owners: Whose each stage is, in a chain of several networks; empty where there is one.
    """

    def __init__(self, stages: Sequence[nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        for i, stage in enumerate(stages):
            self.add_module(f"stage{i}", stage)
        self.names = tuple(names)
        self.layouts: tuple[str, ...] = ("other",) * len(self.names)
        self.input_shape: tuple[int, ...] | None = None
        self.owners: tuple[str, ...] = ()
        self._altered = [False] * len(stages)

    @classmethod
    def chained(cls, runs: Sequence[tuple[str, Stages, Sequence[int]]]) -> Stages:
        """Return stages of several networks in a row; they are shared, not copied.

        Cuts and weights get their owner's name in front: ``local/layer1``, ``local.layer1.0.conv1.weight``.

        Args:
            runs: The owner's name, its stages and the numbers of those to take, run after run.
        """
        taken = [(owner, stages, number) for owner, stages, numbers in runs for number in numbers]
        children = [nn.Sequential(OrderedDict({owner: stages[number]})) for owner, stages, number in taken]
        chain = cls(children, [f"{owner}/{stages.names[number]}" for owner, stages, number in taken[:-1]])
        chain.layouts = tuple(stages.layouts[number] for _, stages, number in taken[:-1])
        chain.owners = tuple(owner for owner, _, _ in taken)
        chain.input_shape = taken[0][1].input_shape
        chain._altered = [stages.alters(number) for _, stages, number in taken]
        return chain

    def forward(self, x: Tensor) -> Any:
        """Run all stages: what the backbone returns for a batch (B, …)."""
        check_size(x, self.input_shape)
        for stage in self:
            x = stage(x)
        return x

    def features(self, x: Tensor, at: Iterable[str]) -> dict[str, Tensor]:
        """Return the features at some cuts, running no further than the last of them.

        Args:
            x: A batch (B, …).
            at: Names of cuts, in any order; ``logits`` for the output of the last stage.

        Returns:
            The feature at each name asked for, in the order of execution. No later in-place layer alters them.

        Raises:
            CutError: A name is not among the cuts, or the stages are bound to inputs of another shape.
        """
        check_size(x, self.input_shape)
        wanted = _names(at)
        known = self.names if LOGITS in self.names else (*self.names, LOGITS)
        for name in wanted:
            if name not in known:
                have = f"it was cut at {', '.join(self.names)}" if self.names else "it was not cut anywhere"
                raise CutError(f"no feature is kept at {name!r}: {have}.{did_you_mean(name, self.names)}")
        last = max((known.index(name) for name in wanted), default=-1)
        found = {}
        for i, name in enumerate(known[: last + 1]):
            x = self[i](x)
            if name in wanted:
                found[name] = self.kept(i, x) if i < last else x
        return found

    def kept(self, index: int, feature: Tensor) -> Tensor:
        """Return what stage ``index`` has made, as a copy where the next stage alters its input in place."""
        return feature.clone() if self.alters(index + 1) else feature

    def alters(self, index: int) -> bool:
        """Whether stage ``index`` alters its input in place."""
        return self._altered[index]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile every stage by itself, with the arguments of ``torch.compile``, so that ``features`` gains too."""
        for stage in self:
            stage.compile(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __getitem__(self, index: int) -> nn.Module:
        if not -len(self) <= index < len(self):
            raise IndexError(f"stage {index} of {len(self)}")
        return self.get_submodule(f"stage{index % len(self)}")


def cut(backbone: nn.Module, at: Iterable[str], sample: Tensor) -> Stages:
    """Cut a backbone into stages after the named layers.

    The stages share parameters and buffers with the backbone and name them as it does
    (``stage1.layer2.0.conv1.weight``), and layers that no cut lies in are the backbone's own modules: to train, freeze
    or move one without the other, cut a deep copy. Each mode of the backbone is traced, so dropout, drop-path and
    BatchNorm behave as they do in it. A layer that a cut lies in is opened: what its own forward does follows the mode
    of the stage, while the layers it calls follow their own. Sizes that would pass a cut are no obstacle: that of the
    batch is read anew, and those of the input are written into the stages, which then take inputs of the sample's size.

    In an opened forward a function with a backward of its own stays one step, and so does a layer under
    ``torch.utils.checkpoint``; blocks without gradients or in mixed precision stay what they are, and random draws are
    made anew. What a recording would freeze is refused: branches on values, sizes or draws, hooks, state that is kept
    from call to call. Numbers and other plain attributes of its module are those at the time of the cut.

    The stages are checked against the backbone on the sample, in eval and in training mode: results, buffers and the
    random draws must be equal in every bit, and gradients to rounding. The check leaves buffers, gradients, modes and
    random generators as they were.

    Args:
        backbone: Network whose ``forward`` takes one tensor, a batch; further arguments keep their defaults.
        at: Names of layers (as in ``named_modules``) in the order of execution. One that is called several times stands
            for its last call.
        sample: A batch (B, …) on the backbone's device, images or token ids; one sample is enough.

    Returns:
        One stage more than there are names, in the backbone's modes.

    Raises:
        CutError: A layer is unknown, unused, returns something else than one tensor, or is not all that passes from
            the layers before to those behind; names are out of order or given twice; the backbone does not run on
            the sample; or its forward does what a cut would lose. The message names the line and what to change.
    """
    names = _names(at)
    _check_names(backbone, names)
    failure: Exception | None = None
    with preserved(backbone) as rewind:
        reference = Reference(backbone, sample, rewind)
        depths = list(DEPTHS)
        while depths:
            depth = depths.pop(0)
            try:
                traces = _trace(reference, names, depth)
                stages = build(reference, names, traces)
                check(stages, reference, traces[False].opened)
                break
            except Exception as error:
                # A reason in words is worth more than whatever broke inside a forward.
                if failure is None or (isinstance(error, CutError) and not isinstance(failure, CutError)):
                    failure = error
                if isinstance(error, CrossingError):
                    # A layer kept whole may hide that it hands through only one of several tensors, so the most open
                    # graph decides.
                    depths = sorted(depths, reverse=True) if depth < max(DEPTHS) else []
        else:
            if isinstance(failure, CutError):
                raise failure
            raise CutError(
                f"{type(backbone).__name__} cannot be traced to cut it at {', '.join(names)}: {first_line(failure)}"
            ) from failure
    follow_modes(stages, backbone)
    return stages


def _names(at: Iterable[str]) -> list[str]:
    if isinstance(at, str):
        raise CutError(f"at is a list of layer names, got the string {at!r}; write at=[{at!r}].")
    return list(at)


def _check_names(backbone: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that no layer has, that stand twice, or that are second names of shared layers."""
    layers = dict(backbone.named_modules(remove_duplicate=False))
    first = {id(layer): name for name, layer in reversed(layers.items())}
    del layers[""]
    for i, name in enumerate(names):
        if name not in layers:
            raise CutError(f"{type(backbone).__name__} has no layer {name!r}.{did_you_mean(name, layers)}")
        if name in names[:i]:
            raise CutError(f"layer {name!r} is given twice among the cuts {', '.join(names)}.")
        if (known := first[id(layers[name])]) != name:
            raise CutError(f"layer {name!r} is the same module as {known!r}; cut at {known!r}.")


def _trace(reference: Reference, names: Sequence[str], depth: int) -> dict[bool, Trace]:
    traces = trace(reference.backbone, names, depth)
    ends = [(traced, traced.outputs[name]) for traced in traces.values() for name in names if name in traced.outputs]
    if any(crossing(traced, node) != [node] for traced, node in ends):
        fold_sizes(traces, observe(traces, reference), reference.batch)
    return traces


def build(reference: Reference, names: Sequence[str], traces: dict[bool, Trace]) -> Stages:
    """Make stages of a backbone's graphs; not checked yet."""
    backbone = reference.backbone
    slices = {training: _slice(backbone, names, traced) for training, traced in traces.items()}
    stages = [
        Stage(backbone, {training: parts[i].graph for training, parts in slices.items()}) for i in range(len(names) + 1)
    ]
    cut_up = Stages(stages, names)
    if any(part.sized for parts in slices.values() for part in parts):
        cut_up.input_shape = tuple(reference.samples[False].shape[1:])
    return cut_up


def _slice(backbone: nn.Module, names: Sequence[str], traced: Trace) -> list[Slice]:
    position = {node: i for i, node in enumerate(traced.graph.nodes)}
    ends = []
    for name in names:
        if name in traced.returned:
            raise CutError(f"layer {name!r} returns a {traced.returned[name]}, not one tensor.")
        if name not in traced.outputs:
            if (outer := next((each for each in _outside(name) if traced.checkpointed(each)), None)) is not None:
                raise CutError(f"layer {name!r} lies in {outer!r}, which is checkpointed. {CHECKPOINT_WAY_OUT}")
            raise CutError(f"layer {name!r} is not called as a module in the forward of {type(backbone).__name__}.")
        ends.append(position[traced.outputs[name]])
    _check_order(names, ends)
    for name in names:
        node = traced.outputs[name]
        passing = crossing(traced, node)
        if passing != [node]:
            kinds = [f" ({traced.kinds[each]})" if each in traced.kinds else "" for each in passing]
            listed = ", ".join(f"{traced.names[each]!r}{kind}" for each, kind in zip(passing, kinds, strict=True))
            refusal = CutError if any(kinds) else CrossingError
            raise refusal(
                f"the cut after {name!r} is crossed by {len(passing)} {'values' if any(kinds) else 'tensors'}: "
                f"{listed}. A cut needs a layer whose output alone passes on; cut_points lists them."
            )
    part_of = {
        node: sum(end < i for end in ends)
        for node, i in position.items()
        if node not in traced.constant and node.op not in ("placeholder", "output")
    }
    return slice_graph(traced, part_of, len(names) + 1)


def _outside(name: str) -> list[str]:
    return [name[:i] for i, letter in enumerate(name) if letter == "."]


def _check_order(names: Sequence[str], ends: Sequence[int]) -> None:
    for first, second, a, b in zip(names, names[1:], ends, ends[1:], strict=False):
        if a == b:
            raise CutError(f"layers {first!r} and {second!r} end with the same tensor; cut at one of them.")
    if list(ends) != sorted(ends):
        right = [name for _, name in sorted(zip(ends, names, strict=True))]
        raise CutError(f"cuts {', '.join(names)} are out of order: the backbone runs them as {', '.join(right)}.")


def check(stages: Stages, reference: Reference, opened: Sequence[str]) -> None:
    """Compare stages with the backbone; note layouts, and which features a later layer alters in place."""
    channels = DimTracker()

    def run(x: Tensor) -> Any:
        seen = []
        channels.start(x)
        for i, stage in enumerate(stages):
            if not isinstance(x, Tensor):
                raise CutError(f"layer {stages.names[i - 1]!r} returns a {type(x).__name__}, not one tensor.")
            seen.append((x, x._version))
            x = stage(x)
        stages._altered = [a or f._version != v for a, (f, v) in zip(stages._altered, seen, strict=True)]
        if not stages[0].training:
            stages.layouts = tuple(layout_of(feature, channels, batch=1) for feature, _ in seen[1:])
        return x

    with channels:
        reference.check(stages, run, training=False, opened=opened)
    reference.check(stages, run, training=True, opened=opened)
