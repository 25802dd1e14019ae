"""The way of a sample from exit to exit through a network that it may leave early."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cleave.architectures.network.outputs import LOGITS, Op, plan, read_by

if TYPE_CHECKING:
    from cleave.architectures.network.staged import StagedNetwork

Step = Callable[[dict[str, Tensor]], tuple[Tensor | None, dict[str, Tensor]]]


def exit_steps(network: StagedNetwork) -> Iterator[Step]:
    """Return one step an exit: from what is carried to the exit's own logits and what goes on."""
    own = network.group("exits") if network.exits else (LOGITS,)
    ops = in_sequence(plan(network.ops, own, ()))
    ends = [next(i for i, op in enumerate(ops) if name in op.gives) + 1 for name in own]
    for name, start, end in zip(own, [0, *ends], ends, strict=False):
        yield functools.partial(_step, network, ops[start:end], name, read_by(ops[end:]))


def _step(
    network: StagedNetwork, ops: Sequence[Op], logits: str, carries: Sequence[str], carried: dict[str, Tensor]
) -> tuple[Tensor | None, dict[str, Tensor]]:
    known: dict[str, Any] = dict(carried)
    for op in ops:
        network.compute(op, known)
    return known[logits], {name: known[name] for name in carries}


def in_sequence(ops: Sequence[Op]) -> list[Op]:
    """Return computations in the order in which a device meets them: an exit's classifier where its feature is."""
    late = [op for op in ops if op.step.late]
    waits = {name for op in ops for name in op.gives}
    ordered: list[Op] = []
    for op in (each for each in ops if not each.step.late):
        ordered.append(op)
        waits.difference_update(op.gives)
        while ready := next((each for each in late if not waits.intersection(each.needs)), None):
            late.remove(ready)
            ordered.append(ready)
            waits.difference_update(ready.gives)
    return [*ordered, *late]
