"""What a sample meets on its way through a network, piece by piece, as it is exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cleave.architectures.costs import STAGE
from cleave.architectures.inserts.insert import Half, Insert
from cleave.architectures.network.outputs import FINAL, INPUT, LOGITS, insert_sides, qualified
from cleave.architectures.network.staged import StagedNetwork
from cleave.architectures.normalize import Normalize
from cleave.deployment import Codec, Draw, ImageInput, Input

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
        side: Whose network it runs beside, in a chain of several; else empty.
        draws: What is drawn for it for each sample, by the names in ``needs``.
    """

    module: nn.Module
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    cut: str
    costs: tuple[str, ...] = ()
    codec: Codec | None = None
    is_exit: bool = False
    alters: bool = False
    side: str = ""
    draws: tuple[Draw, ...] = ()


def pieces_of(network: StagedNetwork, input: Input | None) -> list[Piece]:  # noqa: A002
    """Return what a sample meets on its way, in order."""
    pieces: list[Piece] = []
    at = INPUT if input is None else input.name
    owners = network.stages.owners or [""] * len(network.stages)
    if isinstance(input, ImageInput):
        pieces.append(
            Piece(Normalize(input), (at,), (_READY,), network.cuts[0] if network.cuts else FINAL, side=owners[0])
        )
        at = _READY
    for i, cut in enumerate(network.cuts):
        if not (network.replaced and i == 0):
            alters = network.stages.alters(i)
            pieces.append(
                Piece(network.stages[i], (at,), (f"{cut}/input",), cut, (STAGE,), alters=alters, side=owners[i])
            )
            at = f"{cut}/input"
        for insert in network.order_at(cut):
            goes_on = f"{cut}/:{insert.kind}" if insert.passes else at
            pieces += _halves(network, insert, cut, at, goes_on)
            at = goes_on
    last = len(network.stages) - 1
    results = _named_results(network)
    alters = network.stages.alters(last)
    pieces.append(Piece(results, (at,), network.results, FINAL, (STAGE,), alters=alters, side=owners[-1]))
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
    drawn = {name: dataclasses.replace(draw, name=f"{cut}.{name}") for name, draw in insert.draws().items()}
    coded |= {name: draw.name for name, draw in drawn.items()}

    here, there = insert_sides(network, cut)[insert.kind]

    def piece(half: Half, costs: tuple[str, ...], side: str, sends: Codec | None = None) -> Piece:
        needs, gives = (
            tuple(coded.get(name, qualified(name, cut, at, goes_on)) for name in names)
            for names in (half.needs, half.gives)
        )
        alters = network.alters_input(cut, insert)  # another may still read what it takes
        draws = tuple(drawn[name] for name in half.needs if name in drawn)
        return Piece(half.module, needs, gives, cut, costs, sends, is_exit, alters, side, draws)

    if codec is None or server is None:
        kinds = tuple(dict.fromkeys(step.kind for step in insert.steps() if step.kind is not None))
        return [piece(device, kinds, here)]
    return [piece(device, ("encoder",), here, codec), piece(server, ("decoder",), there)]


def _coded(cut: str, codec: Codec) -> dict[str, str]:
    """Return the names in the network of what a codec sends, delivers and takes as settings."""
    return {**codec.sent(cut), **codec.delivered(cut), **{name: f"{cut}.{name}" for name in codec.settings}}


def groups_of(pieces: Sequence[Piece]) -> list[list[Piece]]:
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
