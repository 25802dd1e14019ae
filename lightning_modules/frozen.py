"""Frozen networks that travel beside a task without becoming part of it, such as a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cleave.architectures import CutError, StagedNetwork, staged_network
from cleave.architectures.linking.link import HOST, LOCAL
from cleave.lightning_modules.term import STUDENT, Term

LOGITS = "logits"
UNCUT = (LOGITS, "answer", "exits", "answers", "images")
"""Outputs of a whole network, which no cut gives."""


@dataclasses.dataclass(eq=False)
class Frozen:
    """A network held where neither ``state_dict`` nor a deep copy of the task (EMA's) can see it.

    Lightning and torch find sub-modules by attribute; inside this plain object the network stays out of the task's
    parameters, checkpoints and averaged copies. It is frozen for good: no gradients, eval mode.

    Args:
        network: The network, of Cleave's stages or any other that maps the same images to logits; frozen in place.
        path: Checkpoint it came from, empty where it is the pretrained backbone itself.
        sha256: Digest of that file, recorded in the student's checkpoints and compared when a run resumes.
    """

    network: nn.Module
    path: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        self.network.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        """Share instead of copying: a frozen network has no state of its own to part from."""
        return self

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.network.to(device)

    def record(self) -> dict[str, str]:
        """What a checkpoint says of the network."""
        return {"path": self.path, "sha256": self.sha256}

    def check(self, name: str, recorded: Mapping[str, str]) -> None:
        """Compare with what the checkpoint of an interrupted run recorded.

        Raises:
            ValueError: The run was started with another network of this name.
        """
        if recorded["sha256"] != self.sha256:
            raise ValueError(
                f"this run was trained with the {name} {recorded['path'] or 'of the pretrained backbone'!r} "
                f"(sha256 {recorded['sha256'][:12] or 'none'}…) and cannot resume with "
                f"{self.path or 'the pretrained backbone'!r} (sha256 {self.sha256[:12] or 'none'}…); "
                f"give the same file as {name}.ckpt_path"
            )


def staged(frozen: Frozen, name: str, terms: Sequence[Term], student: StagedNetwork) -> Frozen:
    """Return a frozen network as stages, cut at the layers that terms ask of it; where they ask for none, it is uncut.

    Args:
        frozen: The network.
        name: What the terms call it.
        terms: The terms.
        student: The network that is trained, on the same inputs.

    Raises:
        CutError: It lacks an output that a term reads.
        ValueError: A term reads the same output of both networks, but in different shapes.
    """
    network = frozen.network
    missing = [layer for layer in _layers(terms, name) if layer not in getattr(network, "emits", ())]
    if not hasattr(network, "emits") or (missing and not network.cuts):
        # A classifier of ours that is not cut is one stage, the module itself.
        module: Any = network.stages[0] if hasattr(network, "emits") else network  # type: ignore[index]
        sample = torch.randn(2, *student.input_shape, generator=torch.Generator().manual_seed(0))
        try:
            network = staged_network(module, sample, cuts=missing)
        except CutError as error:
            raise CutError(f"the {name} cannot be compared at {', '.join(missing)}: {error}") from error
    _check(network, name, terms, student)  # type: ignore[arg-type]
    return Frozen(network, frozen.path, frozen.sha256)


def _check(network: StagedNetwork, name: str, terms: Sequence[Term], student: StagedNetwork) -> None:
    for term in terms:
        term.bind(network, name)
        try:
            network.check_names(term.asks(name))
        except CutError as error:
            raise CutError(f"the {name}: {error}") from error
        for output in term.asks(name):
            if output not in term.asks(STUDENT) or network.shapes[output] == student.shapes[output]:
                continue
            what, fix = f"feature at {output!r}", f"a {name} of the same family and width, or another layer"
            if output == LOGITS:
                what, fix = "logits", f"a {name} that was trained on the same classes"
            raise ValueError(
                f"the shape of the {name}'s {what} is {network.shapes[output]}, of the student's "
                f"{student.shapes[output]}: they cannot be compared; take {fix}"
            )


def _layers(terms: Sequence[Term], owner: str) -> list[str]:
    """Return the layers whose features terms read; what stands behind an insert only a network of ours has."""
    names = (name.partition("/") for term in terms for name in term.names)
    layers = (output.removesuffix("/input") for whose, _, output in names if whose == owner)
    return list(dict.fromkeys(layer for layer in layers if "/" not in layer and layer not in UNCUT))


def outputs_layers(names: Iterable[str], owner: str) -> list[str]:
    """Return the layers of one network that names of outputs are of; a path's own, ``local/layer1``, are whole."""
    found: dict[str, None] = {}
    for whose, layer, *rest in (name.split("/") for name in names if "/" in name):
        if whose == owner and layer not in UNCUT:
            found[f"{layer}/{rest[0]}" if owner == STUDENT and layer in (LOCAL, HOST) and rest else layer] = None
    return list(found)


def asked_for(others: Mapping[str, Frozen], terms: Sequence[Term], network: StagedNetwork) -> dict[str, Frozen]:
    """Return the frozen networks that some term asks for, cut where it does."""
    owners = {owner for term in terms for owner in term.owners}
    return {name: staged(frozen, name, terms, network) for name, frozen in others.items() if name in owners}
