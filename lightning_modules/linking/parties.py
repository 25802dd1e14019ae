"""A training step as two parties do it, neither of whom holds the other's weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures import Bottleneck, StagedNetwork
from cleave.architectures.network.outputs import INPUT, insert_sides, plan
from cleave.lightning_modules import caching
from cleave.lightning_modules.measuring import Batch
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import STUDENT


@dataclasses.dataclass(eq=False)
class Crossing:
    """What one party sends the other in a step, and the gradient that comes back.

    Args:
        name: Name of the output.
        sender: Who makes it.
        receiver: Who reads it.
        tensor: What is sent, without a graph.
        gradient: What comes back; ``None`` where nothing before it learns.
        answered: Whether it has come back, or never will.
    """

    name: str
    sender: str
    receiver: str
    tensor: Tensor
    gradient: Tensor | None = None
    answered: bool = False


class Absent(nn.Module):
    """A module that the other party holds."""

    widths: tuple[int, ...] = ()

    def forward(self, *values: Any) -> Any:
        """Refuse to run.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("this module is held by the other party of the path")


class Party:
    """One side of a path: it holds its own modules, runs its own computations, and keeps its own graph.

    Args:
        network: The network of a path; its modules are shared, not copied.
        side: ``local`` or ``host``.

    Attributes:
        network: The same network without the other side's modules.
    """

    def __init__(self, network: StagedNetwork, side: str) -> None:
        self.side = side
        self.network = without(network, held_elsewhere(network, side))
        self._sent: list[tuple[Tensor, Crossing]] = []
        self._received: dict[Crossing, Tensor] = {}
        self._finished = False

    def start(self) -> None:
        """Forget the step before."""
        self._sent, self._received, self._finished = [], {}, False

    def send(self, name: str, tensor: Tensor, receiver: str) -> Crossing:
        """Return what leaves of an output: the tensor without its graph."""
        crossing = Crossing(name, self.side, receiver, tensor.detach(), answered=not tensor.requires_grad)
        if tensor.requires_grad:
            self._sent.append((tensor, crossing))
        return crossing

    def receive(self, crossing: Crossing) -> Tensor:
        """Return what has come; where something before it learns, its gradient is kept."""
        if crossing.answered:
            return crossing.tensor
        self._received[crossing] = crossing.tensor.clone().requires_grad_()
        return self._received[crossing]

    def answer(self, crossing: Crossing, loss: Tensor | None) -> None:
        """Send back the gradient of what has come.

        Once the gradients of all that it sent are here, it propagates them back and is done.

        Args:
            crossing: What has come.
            loss: The loss, at the party that has it.
        """
        received = self._received[crossing]
        if all(each.answered for _, each in self._sent):
            self.finish(loss)
            crossing.gradient = received.grad
        else:
            roots, gradients = self._roots(loss)
            found = torch.autograd.grad(roots, [received], gradients, retain_graph=True, allow_unused=True)
            crossing.gradient = found[0]
        crossing.answered = True

    def finish(self, loss: Tensor | None) -> None:
        """Propagate all gradients back, once; they meet as they would in one process."""
        roots, gradients = self._roots(loss)
        if roots and not self._finished:
            torch.autograd.backward(roots, gradients)
        self._finished = True

    def _roots(self, loss: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
        found: list[tuple[Tensor, Tensor | None]] = [] if loss is None or not loss.requires_grad else [(loss, None)]
        found += [(sent, each.gradient) for sent, each in self._sent if each.gradient is not None]
        return [root for root, _ in found], [gradient for _, gradient in found]


class TwoParties:
    """A step of a task as host and local network do it: tensors and gradients alone pass, where the path crosses.

    The local party has the images, the labels and the loss. It sends the feature at lout up, and the exit link's output
    comes down; then its gradient goes up. A gradient comes down only where something learns before the path leaves,
    such as a bottleneck's encoder: else back-propagation ends at the entry link (CoDE 2023, 2024). What each party
    learns from is in every bit what it would be in one process.

    Args:
        task: The task of a path; the parties share the modules of its network.
        owner: The party that has images, labels and loss.

    Raises:
        ValueError: The network has no such side.
    """

    def __init__(self, task: Task, owner: str = "local") -> None:
        self.task = task
        self.owner = owner
        sides = list(dict.fromkeys(op.side for op in task.network.ops))
        if owner not in sides:
            raise ValueError(f"owner={owner!r} is no side of the network: it has {', '.join(map(repr, sides))}")
        self.parties = {side: Party(task.network, side) for side in sides}

    def step(self, batch: Batch) -> tuple[dict[str, Tensor], list[Crossing]]:
        """Compute the losses of a batch, and leave the gradients at the parameters of both parties.

        Args:
            batch: Images, labels and further parts.

        Returns:
            The weighted losses by name, and what has crossed, in order.
        """
        names = self.task.asked[STUDENT]
        for party in self.parties.values():
            party.start()
        found, crossings = self._forward(batch, names)
        given = {f"{STUDENT}/{name}": value for name, value in found.items()}
        losses = self.task.training_loss({**batch, "given": {**batch.get("given", {}), **given}})
        loss = torch.stack(list(losses.values())).sum()
        self._backward(crossings, loss)
        return losses, crossings

    def _forward(self, batch: Batch, names: Sequence[str]) -> tuple[dict[str, Tensor], list[Crossing]]:
        stored = caching.given_of(batch, STUDENT)
        ops = plan(self.task.network.ops, names, stored)
        known: dict[str, dict[str, Any]] = {side: {} for side in self.parties}
        known[self.owner] |= {INPUT: batch.get(self.task.reads), **stored}
        made_by = {name: op.side for op in ops for name in op.gives}
        asked = frozenset(name for op in ops for name in op.needs).union(names)
        crossings: list[Crossing] = []

        def bring(wanted: Iterable[str], side: str) -> None:
            for name in wanted:
                if name in known[side]:
                    continue
                sender = made_by.get(name, self.owner)
                crossing = self.parties[sender].send(name, known[sender][name], side)
                known[side][name] = self.parties[side].receive(crossing)
                crossings.append(crossing)

        for op in ops:
            bring(op.needs, op.side)
            self.parties[op.side].network.compute(op, known[op.side], asked)
        bring(names, self.owner)
        return {name: known[self.owner][name] for name in names}, crossings

    def _backward(self, crossings: Sequence[Crossing], loss: Tensor) -> None:
        """Pass the gradients back, that of the last crossing first."""
        for crossing in reversed(crossings):
            if not crossing.answered:
                self.parties[crossing.receiver].answer(crossing, loss if crossing.receiver == self.owner else None)
        for side, party in self.parties.items():
            party.finish(loss if side == self.owner else None)


def held_elsewhere(network: StagedNetwork, side: str) -> list[str]:
    """Return the paths of the modules that the other side holds; of what sends, each side holds its own half."""
    owners = network.stages.owners
    found = [f"stages.stage{number}" for number, owner in enumerate(owners) if owner != side]
    for cut in network.cuts:
        sides = insert_sides(network, cut)
        for insert in network.inserts_at(cut):
            here, there = sides[insert.kind]
            path = network.path_of(cut, insert)
            if side not in (here, there):
                found.append(path)
            elif here != there:
                found += [f"{path}.{half}" for half in _other_half(network.bottlenecks[cut], side == there)]
    if network.ensemble is not None and owners[-1] != side:
        found.append("ensemble")
    return found


def _other_half(bottleneck: Bottleneck, receiving: bool) -> list[str]:
    """Return the modules of a bottleneck that the other side holds; noise and a learned range are the sender's."""
    if not receiving:
        return ["decoder"]
    own = ["encoder"] if bottleneck.noise is None else ["encoder", "noise"]
    learned = any(True for _ in bottleneck.quantizer.parameters())
    return [*own, "quantizer"] if learned and not bottleneck.widths else own


def without(module: Any, paths: Sequence[str]) -> Any:
    """Return a shallow copy of a module in which others stand for some of its own; the rest is shared."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    below: dict[str, list[str]] = {}
    for path in paths:
        name, _, rest = path.partition(".")
        below.setdefault(name, []).append(rest)
    for name, rests in below.items():
        clone._modules[name] = Absent() if "" in rests else without(module._modules[name], rests)
    return clone
