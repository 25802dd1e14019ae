"""The partitions of a network: what runs where, and what passes between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from cleave.architectures.inserts.bottleneck import LEVELS
from cleave.architectures.inserts.switchable import SwitchableBatchNorm2d, select
from cleave.architectures.network.outputs import FINAL, INPUT, LOGITS
from cleave.architectures.network.staged import StagedNetwork
from cleave.architectures.pieces import Piece, groups_of, pieces_of
from cleave.deployment import Codec, Draw, Edge, ExitPolicy, ExitSpec, FloatCodec, Input, Part, Transfer

DEVICE, EDGE, SERVER = "device", "edge", "server"


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
        draws: What the placements draw for their partitions.
    """

    parts: list[Part]
    edges: list[Edge]
    exits: list[ExitSpec]
    draws: list[Draw]


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
    is read by an exit. Without exits the parts of a path through two networks are ``local_front``, ``host_middle``,
    which holds the links, and ``local_back``. A channel that disturbs a link is part of none.

    Args:
        network: The network, in eval mode.
        input: What it takes; the first partition normalises images by it. ``None``: it takes its input as it is, under
            the name ``images``.
        placements: Where each partition runs, free names; ``None``: the first up to where something is sent on the
            ``device``, those behind the last on the ``server``, and what stands between on an ``edge``; on a path
            through two networks, ``local`` and ``host``.
        policy: Counts its own work at each exit, where it is not negligible.
        accuracies: What was measured of exits, by name.

    Raises:
        ValueError: There are more or fewer placements than partitions, or both halves of a bottleneck are placed
            together, so that nothing would be sent.
    """
    groups = groups_of(pieces_of(network, input))
    places = _placements(groups, placements)
    names = _names(groups, places, bool(network.exits))
    codecs = {piece.cut: piece.codec for group in groups for piece in group if piece.codec is not None}
    draws = [draw for group in groups for piece in group for draw in piece.draws]
    supplied = {f"{cut}.{setting}" for cut, codec in codecs.items() for setting in codec.settings}
    supplied |= {draw.name for draw in draws}
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
    return Partitions(parts, edges, _exits(network, groups, parts, policy, accuracies or {}), draws)


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
    if placements is None and groups[0][-1].side:
        placements = [group[-1].side for group in groups]
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
    if not exits and groups[0][-1].side:
        return _names_by_side([group[-1].side for group in groups])
    ends = [group[-1].cut.replace("/", "_") for group in groups]
    # Where the head is replaced, the exit at the split stands behind what was sent: two partitions end at that cut.
    return [f"to_{end}{'_sent' if end in ends[index + 1 :] else ''}" for index, end in enumerate(ends)]


def _names_by_side(sides: Sequence[str]) -> list[str]:
    """Return the names of partitions along a path: ``local_front``, ``host_middle``, ``local_back``."""
    ends = ["front", *["middle"] * (len(sides) - 2), "back"]
    names = [f"{side}_{end}" for side, end in zip(sides, ends, strict=True)]
    numbers = [names[: place + 1].count(name) if names.count(name) > 1 else "" for place, name in enumerate(names)]
    return [f"{name}{number}" for name, number in zip(names, numbers, strict=True)]


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
