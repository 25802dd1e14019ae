"""The parts of a network that can be trained or frozen, and the names by which ``train`` calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from cleave.architectures.naming import did_you_mean

if TYPE_CHECKING:
    from cleave.architectures.network.staged import StagedNetwork

BACKBONE, HEAD, MIDDLE, TAIL = "backbone", "head", "middle", "tail"
BOTTLENECK = ("encoder", "noise", "quantizer", "decoder")
ENSEMBLE = "ensemble"


def stage_parts(network: StagedNetwork) -> list[str]:
    """Return the part that each stage belongs to: what stands before, between and behind the bottlenecks.

    In a chain of several networks it is the name of the network.
    """
    if network.stages.owners:
        return list(network.stages.owners)
    places = [network.cuts.index(cut) for cut in network.bottlenecks]
    if not places:
        return [BACKBONE] * len(network.stages)
    names = []
    for i in range(len(network.stages)):
        before = [place for place in places if place < i]
        if not before:
            names.append(HEAD)
        else:
            names.append(TAIL if len(before) == len(places) else f"{MIDDLE}/{network.cuts[before[-1]]}")
    return names


def network_parts(network: StagedNetwork) -> dict[str, tuple[nn.Module, ...]]:
    """Return the parts of a network by name, in the order in which a sample meets them; exits come last."""
    found: dict[str, list[nn.Module]] = {}
    names = stage_parts(network)
    for i, stage in enumerate(network.stages):
        if not (i == 0 and network.replaced):
            found.setdefault(names[i], []).append(stage)
        if i < len(network.cuts):
            for insert in (each for each in network.inserts_at(network.cuts[i]) if each.passes):
                for part, module in insert.parts().items():
                    found[f"{part}/{network.cuts[i]}"] = [module]
    for cut in network.cuts:
        for insert in (each for each in network.inserts_at(cut) if not each.passes):
            for part, module in insert.parts().items():
                found[f"{part}/{cut}"] = [module]
    if network.ensemble is not None:
        found[ENSEMBLE] = [network.ensemble]
    return {name: tuple(modules) for name, modules in found.items()}


def resolve_parts(network: StagedNetwork, train: Sequence[str]) -> tuple[str, ...]:
    """Return the parts that some names stand for, in order.

    ``backbone`` is all stages; a bare name, such as ``encoder`` or ``exits``, stands for those at every cut;
    ``bottleneck`` is encoder, noise, quantiser and decoder.

    Raises:
        ValueError: A name stands for no part of this network, or none of the parts has parameters.
    """
    if isinstance(train, str):
        raise ValueError(f"train is a list of parts, got the string {train!r}; write train=[{train}]")
    parts = network.parts()
    aliases = part_names(parts)
    wanted: set[str] = set()
    for name in train:
        if name not in aliases:
            raise ValueError(
                f"train names {name!r}, which this network lacks: its parts are {', '.join(aliases)}."
                + did_you_mean(name, aliases)
            )
        wanted.update(aliases[name])
    chosen = tuple(name for name in parts if name in wanted)
    if not any(True for name in chosen for module in parts[name] for _ in module.parameters()):
        raise ValueError(f"train={list(train)} trains nothing: none of these parts has parameters in this network")
    return chosen


def part_names(parts: Sequence[str] | dict[str, tuple[nn.Module, ...]]) -> dict[str, tuple[str, ...]]:
    """Return every name that ``train`` may hold with the parts it stands for."""
    aliases: dict[str, list[str]] = {}
    for part in parts:
        kind, _, cut = part.partition("/")
        names = [kind, part]
        if kind in (HEAD, MIDDLE, TAIL):
            names.insert(0, BACKBONE)
        if kind in BOTTLENECK:
            names = ["bottleneck", f"bottleneck/{cut}", *names]
        for name in dict.fromkeys(names):
            aliases.setdefault(name, []).append(part)
    return {name: tuple(found) for name, found in aliases.items()}
