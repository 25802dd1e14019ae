"""Which of a network's exits to keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cleave.architectures import StagedNetwork
from cleave.deployment import build_policy
from cleave.planning import Placement, calibrate_budget, cost_curve, exit_bits, measure, place_exits
from cleave.reports.exits.points import Study

SWEPT = 21  # thresholds that placements are sought for


def place(study: Study, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Choose exits of a network that has many, by val, and say what they would achieve.

    For each of some confidence thresholds the best exits within the budget are found; of these the most accurate are
    kept, and their threshold is calibrated anew, since fewer heads cost less.

    Args:
        study: What the exits said.
        settings: ``exits``, how many to choose, and ``budget``, a share of the backbone's MACs.

    Raises:
        ValueError: The exits depend on each other, or no choice keeps to the budget.
    """
    network = study.network
    if network.cascade:
        raise ValueError("placement needs exits that stand alone, these form a cascade; train with exits.cascade=false")
    stages, heads = stage_and_head_macs(network)
    budget = settings["budget"] * network.backbone_macs
    placement = _best(study, stages, heads, settings["exits"], budget)
    kept = [*placement.exits, len(heads)]
    costs = _costs(stages, heads, kept)
    temperatures = None if study.temperatures is None else [study.temperatures[i] for i in kept]
    policy = build_policy("confidence", 1.0, exits=len(kept), temperatures=temperatures)
    found = calibrate_budget(policy, study.val.logits[kept], study.val.labels, costs, budget, shared=True)
    tested = measure(found.policy, study.test.logits[kept], study.test.labels, costs)
    return {
        "exits": [network.exits[i] for i in placement.exits],
        "budget": settings["budget"],
        "thresholds": list(found.policy.thresholds),
        "val_accuracy": found.accuracy,
        "val_cost": found.cost / network.backbone_macs,
        "accuracy": tested.accuracy,
        "cost": tested.cost / network.backbone_macs,
        "shares": list(tested.shares),
        "exact": placement.exact,
    }


def _best(study: Study, stages: list[int], heads: list[int], count: int, budget: float) -> Placement:
    policy = study.policy("confidence")
    costs = _costs(stages, heads, range(len(stages)))
    found, refusal = [], None
    for point in cost_curve(policy, *study.val, costs, SWEPT):
        correct, leaves = exit_bits(policy.with_thresholds(point.thresholds), *study.val)
        try:
            found.append(place_exits(correct, leaves, stages, heads, count, budget))
        except ValueError as error:
            refusal = refusal or error  # the first threshold is the cheapest
    if not found:
        raise ValueError(f"placement: {refusal}") from refusal
    return max(found, key=lambda placement: (placement.accuracy, -placement.cost))


def stage_and_head_macs(network: StagedNetwork) -> tuple[list[int], list[int]]:
    """Return the MACs from exit to exit, what is sent between them included, and those of each exit's own head."""
    stages, heads = [0], []
    for cost in network.costs():
        if cost.kind == "exit":
            heads.append(cost.macs)
            stages.append(0)
        else:
            stages[-1] += cost.macs
    return stages, heads


def _costs(stages: list[int], heads: list[int], kept: Iterable[int]) -> list[int]:
    """Return the cumulative MACs of leaving at each exit that is kept, the last classifier among them."""
    costs, on_the_way = [], 0
    for exit in kept:
        on_the_way += heads[exit] if exit < len(heads) else 0
        costs.append(sum(stages[: exit + 1]) + on_the_way)
    return costs
