"""The partitions of a network: what runs where, and what passes between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from cleave.architectures.costs import STAGE
from cleave.architectures.inserts.bottleneck import LEVELS
from cleave.architectures.inserts.insert import Half, Insert
from cleave.architectures.inserts.switchable import SwitchableBatchNorm2d, select
from cleave.architectures.network.outputs import FINAL, INPUT, LOGITS, qualified
from cleave.architectures.network.staged import StagedNetwork
from cleave.architectures.normalize import Normalize
from cleave.deployment import Codec, Edge, ExitPolicy, ExitSpec, FloatCodec, ImageInput, Input, Part, Transfer

DEVICE, EDGE, SERVER = "device", "edge", "server"
_READY = ":input"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One module on the way through a network, with the names of what it reads and makes.

    Attributes:
        module: It takes what it needs by position, and returns what it gives.
        needs: Names in the network.
        gives: Names in the network.
        cut: The cut that it stands at or ends with.
        costs: Kinds of the costs that it causes there.
        codec: How what it gives becomes bytes, of the device's half of a bottleneck.
        is_exit: Whether a policy decides behind it.
        alters: Whether it works in place on what it reads.
    """

    module: nn.Module
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    cut: str
    costs: tuple[str, ...] = ()
    codec: Codec | None = None
    is_exit: bool = False
    alters: bool = False


class PartitionModule(nn.Module):
    """Several pieces in a row: what one partition runs.

    Args:
        pieces: In the order of execution; their modules are shared, not copied.
        inputs: Names of what it takes, in order.
        outputs: Names of what it returns, in order.
        levels: The input that says at which width BatchNorm layers with several run, if there is one.
    """

    def __init__(
        self, pieces: Sequence[Piece], inputs: Sequence[str], outputs: Sequence[str], levels: str | None = None
    ) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(piece.module for piece in pieces)
        self.wiring = [(piece.needs, piece.gives, piece.alters) for piece in pieces]
        self.inputs, self.outputs, self.levels = tuple(inputs), tuple(outputs), levels

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs of the inputs, one tensor or several."""
        known = dict(zip(self.inputs, tensors, strict=True))
        if self.levels is not None:
            select(self.pieces, known[self.levels])
        for module, (needs, gives, alters) in zip(self.pieces, self.wiring, strict=True):
            values = [known[name].clone() if alters else known[name] for name in needs]
            result = module(*values)
            known.update(zip(gives, result if isinstance(result, tuple | list) else (result,), strict=True))
        found = tuple(known[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found


class Partitions(NamedTuple):
    """A network as it is exported.

    Attributes:
        parts: The partitions in the order of the route.
        edges: What passes between them.
        exits: The exits, the last classifier among them; empty where there is none before it.
    """

    parts: list[Part]
    edges: list[Edge]
    exits: list[ExitSpec]


def network_partitions(
    network: StagedNetwork,
    input: Input | None = None,  # noqa: A002
    placements: Sequence[str] | None = None,
    policy: ExitPolicy | None = None,
    accuracies: Mapping[str, float] | None = None,
) -> Partitions:
    """Describe a network as partitions, the edges between them, and its exits.

    A partition ends at each exit and where a bottleneck sends. It is named for its placement where it is alone there,
    else for the layer that it ends with: ``to_layer1`` … ``to_final``, and ``to_layer1_sent`` where what is sent there
    is read by an exit. A channel that disturbs a link is part of none.

    Args:
        network: The network, in eval mode.
        input: What it takes; the first partition normalises images by it. ``None``: it takes its input as it is, under
            the name ``images``.
        placements: Where each partition runs, free names; ``None``: the first up to where something is sent on the
            ``device``, those behind the last on the ``server``, and what stands between on an ``edge``.
        policy: Counts its own work at each exit, where it is not negligible.
        accuracies: What was measured of exits, by name.

    Raises:
        ValueError: There are more or fewer placements than partitions, or both halves of a bottleneck are placed
            together, so that nothing would be sent.
    """
    groups = _groups(_pieces(network, input))
    places = _placements(groups, placements)
    names = _names(groups, places, bool(network.exits))
    codecs = {piece.cut: piece.codec for group in groups for piece in group if piece.codec is not None}
    supplied = {f"{cut}.{setting}" for cut, codec in codecs.items() for setting in codec.settings}
    results = {*network.results, *(network.group("exits") if network.exits else ())}
    costs = {(cost.name, cost.kind): cost.macs for cost in network.costs()}
    taken = [_taken(group) for group in groups]
    parts, edges = [], []
    for index, group in enumerate(groups):
        levels = _levels(groups, index)
        inputs = tuple(dict.fromkeys([*taken[index], *([levels] if levels else [])]))
        given = [name for piece in group for name in piece.gives]
        later = {name for names_ in taken[index + 1 :] for name in names_}
        outputs = tuple(name for name in given if name in later or name in results)
        macs = sum(costs.get((piece.cut, kind), 0) for piece in group for kind in piece.costs)
        module = PartitionModule(group, inputs, outputs, levels)
        parts.append(Part(names[index], places[index], module, inputs, outputs, macs))
        own = [name for name in inputs if name not in supplied and name != (INPUT if input is None else input.name)]
        edges += _edges(network, groups, index, own, names, places, codecs)
    return Partitions(parts, edges, _exits(network, groups, parts, policy, accuracies or {}))


def _pieces(network: StagedNetwork, input: Input | None) -> list[Piece]:  # noqa: A002
    """Return what a sample meets on its way, in order."""
    pieces: list[Piece] = []
    at = INPUT if input is None else input.name
    if isinstance(input, ImageInput):
        pieces.append(Piece(Normalize(input), (at,), (_READY,), network.cuts[0] if network.cuts else FINAL))
        at = _READY
    for i, cut in enumerate(network.cuts):
        if not (network.replaced and i == 0):
            alters = network.stages.alters(i)
            pieces.append(Piece(network.stages[i], (at,), (f"{cut}/input",), cut, (STAGE,), alters=alters))
            at = f"{cut}/input"
        for insert in network.order_at(cut):
            goes_on = f"{cut}/:{insert.kind}" if insert.passes else at
            pieces += _halves(network, insert, cut, at, goes_on)
            at = goes_on
    last = len(network.stages) - 1
    results = _named_results(network)
    pieces.append(Piece(results, (at,), network.results, FINAL, (STAGE,), alters=network.stages.alters(last)))
    return pieces


def _named_results(network: StagedNetwork) -> nn.Module:
    last = network.stages[-1]
    return last if network.results == (LOGITS,) else _Results(last)


class _Results(nn.Module):
    """The last stage of a network of several results, as a tuple."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        result = self.stage(x)
        return tuple(result.values()) if isinstance(result, Mapping) else tuple(result)


def _halves(network: StagedNetwork, insert: Insert, cut: str, at: str, goes_on: str) -> list[Piece]:
    device, codec, server = insert.halves()
    is_exit = not insert.passes and LOGITS in insert.emits
    # What a codec makes of a tensor has the tensor's name before a dot.
    coded = {} if codec is None else _coded(cut, codec)

    def piece(half: Half, costs: tuple[str, ...], sends: Codec | None = None) -> Piece:
        needs, gives = (
            tuple(coded.get(name, qualified(name, cut, at, goes_on)) for name in names)
            for names in (half.needs, half.gives)
        )
        alters = network.alters_input(cut, insert)  # another may still read what it takes
        return Piece(half.module, needs, gives, cut, costs, sends, is_exit, alters)

    if codec is None or server is None:
        kinds = tuple(dict.fromkeys(step.kind for step in insert.steps() if step.kind is not None))
        return [piece(device, kinds)]
    return [piece(device, ("encoder",), codec), piece(server, ("decoder",))]


def _coded(cut: str, codec: Codec) -> dict[str, str]:
    """Return the names in the network of what a codec sends, delivers and takes as settings."""
    return {**codec.sent(cut), **codec.delivered(cut), **{name: f"{cut}.{name}" for name in codec.settings}}


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Divide the way into partitions: behind what sends, and behind an exit unless its cut goes on to send."""
    groups: list[list[Piece]] = [[]]
    for number, piece in enumerate(pieces):
        groups[-1].append(piece)
        ahead = [each for each in pieces[number + 1 :] if each.cut == piece.cut]
        sends = piece.codec is not None
        waits = any(each.codec is not None for each in ahead)
        decides = any(each.is_exit for each in groups[-1]) and not any(each.is_exit for each in ahead)
        if number + 1 < len(pieces) and (sends or (decides and not waits)):
            groups.append([])
    return groups


def _taken(group: Sequence[Piece]) -> list[str]:
    """Return what a partition reads of others, in order; settings of its own sender behind what it receives."""
    made: set[str] = set()
    found: list[str] = []
    for piece in group:
        found += [name for name in piece.needs if name not in made]
        made.update(piece.gives)
    return list(dict.fromkeys(found))


def _levels(groups: Sequence[Sequence[Piece]], index: int) -> str | None:
    """Return the setting that the BatchNorm layers of a partition follow, if they know several widths."""
    if not any(isinstance(each, SwitchableBatchNorm2d) for piece in groups[index] for each in piece.module.modules()):
        return None
    senders = [piece.cut for group in groups[:index] for piece in group if piece.codec is not None]
    return f"{senders[-1]}.{LEVELS}"


def _placements(groups: Sequence[Sequence[Piece]], placements: Sequence[str] | None) -> list[str]:
    """Return where each partition runs."""
    ends = [group[-1].cut for group in groups]
    sends = [any(piece.codec is not None for piece in group) for group in groups]
    if placements is None:
        total, found, sent = sum(sends), [], 0
        for sender in sends:
            place = DEVICE if sent == 0 else SERVER if sent == total else EDGE if total == 2 else f"{EDGE}{sent}"
            found.append(place)
            sent += sender
        return found
    if isinstance(placements, str) or not all(isinstance(place, str) and place for place in placements):
        raise ValueError(f"placements are a list of names, got {placements!r}; write placements=[device,server]")
    if len(placements) != len(groups):
        raise ValueError(
            f"placements has {len(placements)} names, but there are {len(groups)} partitions, which end at "
            f"{', '.join(ends)}; say for each where it runs"
        )
    for index, sender in enumerate(sends):
        if sender and placements[index] == placements[index + 1]:
            raise ValueError(
                f"placements has the partitions to {ends[index]} and to {ends[index + 1]} both on "
                f"{placements[index]}: nothing is sent at the split {ends[index]}, where the bottleneck stands; place "
                "them apart"
            )
    return list(placements)


def _names(groups: Sequence[Sequence[Piece]], places: Sequence[str], exits: bool) -> list[str]:
    if len(groups) == 1:
        return ["whole"]
    if not exits and len(set(places)) == len(places):
        return list(places)
    ends = [group[-1].cut for group in groups]
    # Where the head is replaced, the exit at the split stands behind what was sent: two partitions end at that cut.
    return [f"to_{end}{'_sent' if end in ends[index + 1 :] else ''}" for index, end in enumerate(ends)]


def _edges(
    network: StagedNetwork,
    groups: Sequence[Sequence[Piece]],
    index: int,
    inputs: Iterable[str],
    names: Sequence[str],
    places: Sequence[str],
    codecs: Mapping[str, Codec],
) -> list[Edge]:
    """Return the edges that end at a partition, one for each that it takes something of."""
    coded = {name: cut for cut, codec in codecs.items() for name in codec.delivered(cut).values()}
    made_by = {name: i for i, group in enumerate(groups[:index]) for piece in group for name in piece.gives}
    sources: dict[int, dict[str, Transfer]] = {}
    for name in inputs:
        tensor = coded.get(name, name)
        maker = made_by[name]
        if tensor in codecs:
            transfer = Transfer(tensor, codecs[tensor])
        elif places[maker] == places[index]:
            transfer = Transfer(tensor)
        else:
            transfer = Transfer(tensor, FloatCodec(network.shapes[_shape_name(network, name)]))
        sources.setdefault(maker, {})[tensor] = transfer
    return [Edge(names[maker], names[index], tuple(found.values())) for maker, found in sorted(sources.items())]


def _shape_name(network: StagedNetwork, name: str) -> str:
    """Return an output of the same shape as a feature between two inserts of a cut."""
    return name if name in network.shapes else name.partition("/:")[0]


def _exits(
    network: StagedNetwork,
    groups: Sequence[Sequence[Piece]],
    parts: Sequence[Part],
    policy: ExitPolicy | None,
    accuracies: Mapping[str, float],
) -> list[ExitSpec]:
    """Return the exits with the MACs of all partitions until there, and of the policy.

    An exit at a split pays for the encoder beside it too, which ``exit_costs`` leaves out: one partition runs both.
    """
    specs: list[ExitSpec] = []
    macs, classes = 0, network.shapes[LOGITS][0] if network.exits else 0
    for group, part in zip(groups, parts, strict=True):
        macs += part.macs or 0
        found = [piece.cut for piece in group if piece.is_exit]
        found += [FINAL] if network.exits and group is groups[-1] else []
        for name in found:
            macs += 0 if policy is None else policy.macs(len(specs), classes)
            specs.append(ExitSpec(name, part.name, macs, accuracies.get(name)))
    return specs
