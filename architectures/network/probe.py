"""The trial run of a network: the shapes of its outputs, and which computations alter what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cleave.architectures.cutting.stages import CutError
from cleave.architectures.modes import evaluating
from cleave.architectures.network.outputs import INPUT, LOGITS, Op, network_ops

if TYPE_CHECKING:
    from cleave.architectures.network.staged import StagedNetwork


@torch.no_grad()
def probe(network: StagedNetwork, sample: Tensor) -> None:
    """Run everything once: name the results, note each output's shape, and which computations alter what they read.

    The network's state stays as it is. Stages were compared with the backbone in both modes when they were cut; inserts
    are tried in training mode here, since some work in place there alone.
    """
    known: dict[str, Any] = {INPUT: sample[:1].clone()}
    with evaluating(network), torch.random.fork_rng([sample.device] if sample.is_cuda else []):
        for op in network.ops:
            if op.step.method == "finish":
                network.results = result_names(network.stages[-1](known[op.needs[0]].clone()))
                network.ops = network_ops(network)
                op = next(each for each in network.ops if each.step.method == "finish")
            elif op.owner.startswith("at:") and op.step.linked is None:  # no quantiser works in place
                _try_training(network, op, known)
            _run(network, op, known)
    network.shapes = {name: tuple(value.shape[1:]) for name, value in known.items() if value is not None}


def _run(network: StagedNetwork, op: Op, known: dict[str, Any]) -> None:
    before = [known[name]._version for name in op.needs]
    network.compute(op, known, op.gives)
    if before != [known[name]._version for name in op.needs]:
        network._altering.add((op.owner, op.step.method))


def _try_training(network: StagedNetwork, op: Op, known: Mapping[str, Any]) -> None:
    insert = network.get_submodule(op.owner)
    state = [(tensor, tensor.clone()) for tensor in (*insert.parameters(), *insert.buffers())]
    # Two samples: BatchNorm refuses to train on a single value per channel.
    batch = {name: torch.cat([value, value]) for name, value in known.items() if isinstance(value, Tensor)}
    insert.train()
    _run(network, op, batch)
    insert.eval()
    for tensor, value in state:
        tensor.copy_(value)


def result_names(result: Any) -> tuple[str, ...]:
    """Return the names of what a network returns: ``logits``, or ``output/NAME`` for each of several tensors.

    Raises:
        CutError: It returns something else.
    """
    if isinstance(result, Tensor):
        return (LOGITS,)
    values = result if isinstance(result, Mapping) else dict(enumerate(result)) if _is_list(result) else {}
    if not values or not all(isinstance(value, Tensor) for value in values.values()):
        kinds = sorted({type(value).__name__ for value in values.values()})
        what = f"{type(result).__name__} of {', '.join(kinds)}" if kinds else type(result).__name__
        raise CutError(f"the backbone must return a tensor, or tensors in a tuple, a list or a dict; got {what}")
    return tuple(f"output/{name}" for name in values)


def in_order_of(names: Sequence[str], result: Any) -> Tensor | tuple[Tensor, ...]:
    """Return what a network returned as one tensor, or as one for each of its results in their order.

    Raises:
        CutError: It returned something else than when the network was built.
    """
    if isinstance(result, Tensor) and names == (LOGITS,):
        return result
    found = result_names(result)
    if found != tuple(names):
        raise CutError(
            f"the backbone returned {', '.join(found)} now, but {', '.join(names)} when the network was built; wrap it "
            "so that it returns the same in training and in eval mode"
        )
    values = tuple(result.values()) if isinstance(result, Mapping) else tuple(result)
    return values[0] if len(values) == 1 else values


def _is_list(result: Any) -> bool:
    return isinstance(result, tuple | list)
