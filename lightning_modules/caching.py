"""What frozen networks and frozen parts make of the training images, computed once and stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cleave.architectures import StagedNetwork
from cleave.architectures.costs import STAGE
from cleave.architectures.network.outputs import FINAL, INPUT, plan
from cleave.lightning_modules.term import STUDENT


class Stored(NamedTuple):
    """Which outputs are stored.

    Attributes:
        outputs: Names of outputs by the network that makes them.
        inputs: Whether training still needs the networks' inputs beside what is stored.
    """

    outputs: dict[str, tuple[str, ...]]
    inputs: bool

    def compute(self, networks: Mapping[str, StagedNetwork], inputs: Tensor) -> dict[str, Tensor]:
        """Return what is stored of a batch of inputs, by ``OWNER/NAME``."""
        found: dict[str, Tensor] = {}
        for owner, names in self.outputs.items():
            values = networks[owner].outputs(inputs, names)
            found |= {f"{owner}/{name}": value for name, value in values.items()}
        return found


def what_is_stored(
    network: StagedNetwork, trained: Sequence[str], asked: Mapping[str, Sequence[str]], reads_inputs: bool
) -> Stored:
    """Return which outputs of frozen networks and parts can be stored, so that nothing frozen runs in training.

    Args:
        network: The network that is trained.
        trained: The parts of it that learn.
        asked: The outputs that the terms read, by network.
        reads_inputs: Whether a term reads the inputs themselves.
    """
    # A prior that is trained draws the noise that stands for rounding, which cannot be stored.
    noisy = [
        f"encoder/{cut}"
        for cut, bottleneck in network.bottlenecks.items()
        if bottleneck.has_prior and f"quantizer/{cut}" in trained
    ]
    frontier = network.frontier(asked[STUDENT], [*trained, *noisy])
    own = tuple(name for name in frontier if name != INPUT)
    outputs = {owner: tuple(names) for owner, names in asked.items() if owner != STUDENT}
    return Stored({STUDENT: own} | outputs if own else outputs, reads_inputs or INPUT in frontier)


def share_of_macs(network: StagedNetwork, names: Iterable[str]) -> float:
    """Return what computing some outputs takes of all MACs of a network."""
    costs = network.costs()
    run = {(op.cut, op.step.kind) for op in plan(network.ops, names, ())}
    return sum(cost.macs for cost in costs if (cost.name, cost.kind) in run) / max(1, sum(cost.macs for cost in costs))


def given_of(batch: Mapping[str, Any], owner: str) -> dict[str, Tensor]:
    """Return the stored outputs of one network that a batch brings along."""
    prefix = f"{owner}/"
    given: Mapping[str, Tensor] = batch.get("given", {})
    return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


def digest_of(stored: Stored, networks: Mapping[str, StagedNetwork], trained: Sequence[str]) -> str:
    """Return a digest of all that stored outputs depend on: their names, weights and running statistics.

    Args:
        stored: Which outputs are stored.
        networks: The networks by name.
        trained: Parts of the student that learn, on which nothing stored depends.
    """
    digest = hashlib.sha256(json.dumps(stored.outputs).encode())
    for owner, names in stored.outputs.items():
        network = networks[owner]
        digest.update(str([(name, network.shapes[name]) for name in names]).encode())
        for module in _sources(network, names, trained if owner == STUDENT else ()):
            digest.update(str(module).encode())
            for name, value in module.state_dict().items():
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sources(network: StagedNetwork, names: Iterable[str], trained: Sequence[str]) -> list[nn.Module]:
    """Return the modules that computing some outputs runs; of a part of several stages those that run."""
    parts, found = network.parts(), list[nn.Module]()
    for op in plan(network.ops, names, ()):
        if op.step.kind == STAGE:
            found.append(network.stages[-1] if op.cut == FINAL else network.get_submodule(op.owner))
            continue
        found += [module for part in op.uses for module in parts[part]]
        if op.uses or not op.owner:
            continue
        method = getattr(network.get_submodule(op.owner), op.step.method, None)
        if isinstance(method, nn.Module):  # what has no parameters, such as an exit's ``reduce``
            found.append(method)
        else:
            here = [name for name in parts if name.partition("/")[2] == op.cut and name not in trained]
            found += [module for name in here for module in parts[name]]
    return list(dict.fromkeys(found))
