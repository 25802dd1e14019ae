"""The costs of a network, part by part: multiply-accumulates and parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cleave.architectures.inserts.insert import Insert
from cleave.architectures.macs import count_params, counting_macs
from cleave.architectures.modes import evaluating
from cleave.architectures.network.outputs import FINAL, INPUT, Op

if TYPE_CHECKING:
    from cleave.architectures.network.staged import StagedNetwork

STAGE, EXIT = "stage", "exit"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one part of a network costs.

    Args:
        name: The cut that it stands at or ends with; ``final`` for the last stage.
        kind: ``stage``, ``encoder``, ``decoder``, ``exit``, or the kind of another insert.
        macs: Multiply-accumulates per sample.
        params: Parameters.
        side: Whose network it runs beside, in a chain of several; else empty.
    """

    name: str
    kind: str
    macs: int
    params: int
    side: str = ""


@torch.no_grad()
def measure_costs(network: StagedNetwork) -> list[Cost]:
    """Return the costs of a network's parts in the order in which a sample meets them.

    What an encoder draws in training costs nothing: a device runs the mean alone. Nothing is counted for an ensemble,
    whose work is its policy's.
    """
    weight = next(network.parameters())
    dtype = network.input_dtype if not network.input_dtype.is_floating_point else weight.dtype
    known: dict[str, Any] = {INPUT: torch.zeros(1, *network.input_shape, device=weight.device, dtype=dtype)}
    macs: dict[tuple[str, str], int] = {}
    with evaluating(network), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        for op in network.ops:
            with counting_macs() as counter:
                network.compute(op, known)
            if op.step.kind is not None:
                place = (op.cut, op.step.kind)
                macs[place] = macs.get(place, 0) + counter.total
    sides = {(op.cut, op.step.kind): op.side for op in reversed(network.ops)}
    return [Cost(*place, macs[place], _params(network, *place), sides[place]) for place in _in_order(network.ops)]


def cumulative(costs: Sequence[Cost], extra: Callable[[int], int]) -> list[int]:
    """Return the MACs until each exit, the last stage among them, with ``extra`` of each exit by its number."""
    found: list[int] = []
    total = 0
    for cost in costs:
        total += cost.macs
        if cost.kind == EXIT or (cost.kind == STAGE and cost.name == FINAL):
            total += extra(len(found))
            found.append(total)
    return found


def _in_order(ops: Sequence[Op]) -> list[tuple[str, str]]:
    """Return the places of costs in the order of execution, of which late computations have a part before."""
    return list(dict.fromkeys((op.cut, op.step.kind) for op in ops if op.step.kind is not None))


def _params(network: StagedNetwork, cut: str, kind: str) -> int:
    if kind == STAGE:
        return count_params(network.stages[-1 if cut == FINAL else network.cuts.index(cut)])
    owner = next(op.owner for op in network.ops if (op.cut, op.step.kind) == (cut, kind))
    insert = network.get_submodule(owner)
    assert isinstance(insert, Insert)
    return count_params(insert.costed(kind))
