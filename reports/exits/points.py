"""The figures of a report on early exits: what each policy achieves, calibrated on val and measured on test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cleave.architectures import StagedNetwork
from cleave.deployment import EnsemblePolicy, ExitPolicy
from cleave.lightning_modules.evaluators import network_policy
from cleave.planning import (
    Calibrated,
    budgeted_batch,
    calibrate_accuracy_drop,
    calibrate_budget,
    calibration_error,
    cost_curve,
    exit_accuracy,
    expected_excess,
    fit_ensemble,
    fit_temperatures,
    measure,
    overthinking,
    worse_than_exits,
)
from cleave.planning.stored_logits import decisions
from cleave.planning.threshold_search import ROUNDING
from cleave.reports.exits.measure import Costs, Stored


@dataclasses.dataclass(frozen=True)
class Study:
    """What there is to calibrate policies on and to measure them by.

    Attributes:
        network: The network.
        costs: What leaving at each exit costs.
        val: What the exits said of the validation images.
        test: What they said of the test images.
        scheme: ``budget`` or ``budgeted_batch``.
        shared: One threshold for all exits, or one each.
        temperatures: One for each exit, or ``None``.
        fit_ensemble: Whether an ensemble takes weights fitted on val, instead of the network's own.
    """

    network: StagedNetwork
    costs: Costs
    val: Stored
    test: Stored
    scheme: str
    shared: bool
    temperatures: tuple[float, ...] | None
    fit_ensemble: bool = False
    _fitted: dict[str, ExitPolicy] = dataclasses.field(default_factory=dict)
    _known: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def policy(self, kind: str) -> ExitPolicy:
        """Return a policy that fits the network; its thresholds are still to be found."""
        if kind not in self._fitted:
            found = network_policy(self.network, {"kind": kind, "thresholds": 1}).with_temperatures(self.temperatures)
            if self.fit_ensemble and isinstance(found, EnsemblePolicy):
                found = fit_ensemble(found, *self.val)
            self._fitted[kind] = found
        return self._fitted[kind]

    def worse(self) -> list[dict[str, Any]]:
        """Return the exits that answer better alone than in the ensemble, on val."""
        policy = self.policy("ensemble")
        assert isinstance(policy, EnsemblePolicy)
        names = self.network.exits
        found = worse_than_exits(policy, *self.val)
        return [{"name": names[i], "ensemble": both, "exit": alone} for i, both, alone in found]

    def costs_of(self, policy: ExitPolicy) -> list[float]:
        """Return the cumulative cost of leaving at each exit."""
        if policy.kind not in self._known:  # counting MACs runs the network
            self._known[policy.kind] = self.costs.of(self.network, policy)
        return self._known[policy.kind]

    def least(self, policy: ExitPolicy) -> float:
        """Return the least mean cost that any thresholds come to on val, as a share of the backbone's."""
        costs = self.costs_of(policy)
        cheapest = costs[0] if self._by_shares(policy) else cost_curve(policy, *self.val, costs, 2)[0].cost
        return cheapest / self.costs.backbone

    def calibrate(self, policy: ExitPolicy, budget: float, shared: bool | None = None) -> Calibrated | None:
        """Find thresholds within a budget, a share of the backbone's cost; ``None`` where none keep to it."""
        if budget * ROUNDING < self.least(policy):
            return None
        allowed, costs = budget * self.costs.backbone, self.costs_of(policy)
        if self._by_shares(policy):
            return budgeted_batch(policy, *self.val, costs, allowed)
        return calibrate_budget(policy, *self.val, costs, allowed, shared=self.shared if shared is None else shared)

    def _by_shares(self, policy: ExitPolicy) -> bool:
        return self.scheme == "budgeted_batch" and policy.per_exit

    def point(self, found: Calibrated, budget: float | None) -> dict[str, Any]:
        """Measure calibrated thresholds on test."""
        costs, backbone = self.costs_of(found.policy), self.costs.backbone
        tested = measure(found.policy, *self.test, costs)
        samples = len(self.val.labels), len(self.test.labels)
        excess = expected_excess(found.shares, costs, math.inf if budget is None else budget * backbone, *samples)
        return {
            "budget": budget,
            "accuracy": tested.accuracy,
            "cost": tested.cost / backbone,
            "shares": list(tested.shares),
            "thresholds": list(found.policy.thresholds),
            "val_accuracy": found.accuracy,
            "val_cost": found.cost / backbone,
            "cost_error": excess.error / backbone,
            "expected_excess": None if budget is None else excess.expected / backbone,
            "scheme": found.scheme,
        }


def policy_figures(study: Study, kind: str, budgets: Sequence[float], curve: int) -> dict[str, Any]:
    """Return a policy's points at the budgets, the most accurate of all, its curve, and its answers at any time.

    The best is the most accurate on val, found without a budget or within one; a budget that cannot be kept has nulls.
    The curve runs over thresholds at quantiles of val, shared by all exits, measured on test.
    """
    policy = study.policy(kind)
    costs, backbone = study.costs_of(policy), study.costs.backbone
    found = {budget: study.calibrate(policy, budget) for budget in budgets}
    points = [NOT_KEPT | {"budget": budget} if at is None else study.point(at, budget) for budget, at in found.items()]
    unlimited = study.calibrate(policy, math.inf)
    assert unlimited is not None
    best = max(filter(None, [*found.values(), unlimited]), key=lambda at: (at.accuracy, -at.cost))
    swept = cost_curve(policy, *study.val, costs, curve)
    tested = [measure(policy.with_thresholds(point.thresholds), *study.test, costs) for point in swept]
    tested.sort(key=lambda point: point.cost)
    answers = decisions(policy, study.test.logits).answers
    anytime = zip(costs, exit_accuracy(answers, study.test.labels), strict=True)
    return {
        "least": study.least(policy),
        "points": points,
        "best": study.point(best, None),
        "curve": [[point.cost / backbone, point.accuracy] for point in tested],
        "curve_shares": [list(point.shares) for point in tested],
        "curve_thresholds": [list(point.thresholds) for point in tested],
        "anytime": [[cost / backbone, accuracy] for cost, accuracy in anytime],
    }


NOT_KEPT: dict[str, Any] = dict.fromkeys(
    (
        "accuracy",
        "cost",
        "shares",
        "thresholds",
        "val_accuracy",
        "val_cost",
        "cost_error",
        "expected_excess",
        "scheme",
    )
)


def choose(study: Study, settings: Mapping[str, Any]) -> Calibrated:
    """Calibrate the policy to be exported, by what accuracy it may lose or by its budget.

    Raises:
        ValueError: Neither is given, or no threshold keeps to the budget.
    """
    policy, drop, budget = study.policy(settings["policy"]), settings["drop"], settings["budget"]
    if drop is not None:
        return calibrate_accuracy_drop(policy, *study.val, study.costs_of(policy), drop, shared=settings["shared"])
    found = study.calibrate(policy, budget, settings["shared"])
    if found is None:
        raise ValueError(
            f"choose.budget={budget:g} cannot be kept by {policy.kind}: the least possible is "
            f"{study.least(policy):.4g}; raise it, or give choose.drop"
        )
    return found


def exit_figures(study: Study) -> list[dict[str, Any]]:
    """Return what each exit achieves alone on test, if all samples left there."""
    network, (logits, labels) = study.network, study.test
    temperatures = fit_temperatures(*study.val)
    macs = network.exit_costs()
    scaled = logits / logits.new_tensor(temperatures).view(-1, 1, 1)
    columns = {
        "name": network.exits,
        "macs": macs,
        "macs_share": [cost / network.backbone_macs for cost in macs],
        "cost": [cost / study.costs.backbone for cost in study.costs.exits],
        "accuracy": exit_accuracy(logits, labels),
        "ece": calibration_error(logits, labels),
        "temperature": temperatures,
        "ece_scaled": calibration_error(scaled, labels),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def bounds(study: Study) -> dict[str, Any]:
    """Return how often the network overthinks on test, and what an oracle would make of its exits."""
    found = overthinking(*study.test, study.costs.exits)
    oracle = {"accuracy": found.oracle_accuracy, "cost": found.oracle_cost / study.costs.backbone}
    return {"overthinking": found.destructive, "wasteful": found.wasteful, "oracle": oracle}
