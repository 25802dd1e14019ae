"""What a path saves the local network, and what it adds on both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from cleave.architectures.costs import STAGE, Cost
from cleave.architectures.linking.link import HOST, LOCAL, Link
from cleave.architectures.network.staged import StagedNetwork


@dataclasses.dataclass(frozen=True)
class Work:
    """MACs per sample, and parameters."""

    macs: int
    params: int


@dataclasses.dataclass(frozen=True)
class PathCosts:
    """What the parts of a path cost.

    Attributes:
        kept: The local network's own blocks that still run.
        skipped: Those that do not.
        host: The host's blocks that run.
        links: The links.
        inserts: What else stands on the way: bottlenecks, exits and the like.
    """

    kept: Work
    skipped: Work
    host: Work
    links: Work
    inserts: Work


def path_costs(network: StagedNetwork) -> PathCosts | None:
    """Return what the parts of a path cost; ``None`` where a network has no links."""
    if not network.links:
        return None
    costs = network.costs()
    stages = [cost for cost in costs if cost.kind == STAGE]
    links = [cost for cost in costs if cost.kind == Link.kind]
    return PathCosts(
        kept=_sum(cost for cost in stages if cost.side == LOCAL),
        skipped=_sum(network.left_out),
        host=_sum(cost for cost in stages if cost.side == HOST),
        links=_sum(links),
        inserts=_sum(cost for cost in costs if cost not in stages and cost not in links),
    )


def _sum(costs: Iterable[Cost]) -> Work:
    found = list(costs)
    return Work(sum(cost.macs for cost in found), sum(cost.params for cost in found))
