"""Thresholds for early exits, chosen on validation logits: for a budget, or for what accuracy may be lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cleave.deployment import ExitPolicy
from cleave.planning.exit_statistics import CurvePoint, measure
from cleave.planning.stored_logits import Floats, check_costs, check_logits, decisions
from cleave.planning.temperature import check_split
from cleave.planning.threshold_search import (
    ROUNDING,
    Goal,
    Table,
    at_least_right,
    geometric_thresholds,
    per_exit,
    sweep,
    within_budget,
)


@dataclass(frozen=True)
class Calibrated:
    """A policy with thresholds, and what it achieves on the logits that they were chosen on.

    Attributes:
        policy: With its thresholds.
        accuracy: Share of samples that are answered rightly, 0 to 1.
        cost: Mean over samples, in the unit of the costs.
        shares: Share of samples that leave at each exit.
        scheme: ``shared``, ``per_exit`` or ``budgeted_batch``.
        budget: Mean cost that was allowed; ``None`` where accuracy was the goal.
    """

    policy: ExitPolicy
    accuracy: float
    cost: float
    shares: tuple[float, ...]
    scheme: str
    budget: float | None


def calibrate_budget(
    policy: ExitPolicy,
    logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    budget: float,
    *,
    shared: bool = False,
    split: str = "val",
) -> Calibrated:
    """Choose the thresholds of best accuracy at a mean cost within a budget.

    One shared threshold is found exactly, over all distinct scores. Thresholds per exit start there and at the
    geometric ones of :func:`budgeted_batch` and are improved in pairs over at most 32 quantiles an exit, so that they
    are at least as good on these logits and too coarse to fit single samples. Patience is one whole number in any case.

    Args:
        policy: Its temperatures stay as they are; its thresholds do not matter.
        logits: Every exit's own logits (E, B, C).
        labels: int64 (B,).
        costs: Cumulative cost of leaving at each exit, E numbers: MACs, seconds or any other unit.
        budget: Largest mean cost per sample, in the same unit; kept on these logits, up to rounding.
        shared: One threshold for all exits instead of one each.
        split: Where the logits are from; ``test`` is refused.

    Raises:
        ValueError: No threshold keeps to the budget, the split is the test split, or a shape or value is not what it
            must be.

    Example:
        >>> from cleave.deployment import build_policy
        >>> logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])
        >>> policy = build_policy("confidence", 1.0, exits=2)
        >>> found = calibrate_budget(policy, logits, torch.tensor([0, 1]), costs=[1, 4], budget=3)
        >>> found.accuracy, found.cost, found.shares
        (1.0, 2.5, (0.5, 0.5))
    """
    check_split(split)
    table = _table(policy, logits, labels, costs)
    check_budget(budget)
    thresholds = _search(policy, table, within_budget(table, budget), shared)
    if thresholds is None:
        least = sweep(table, policy.candidates()).cost.min() / table.samples
        raise ValueError(f"budget={budget:g} cannot be kept: the least possible mean cost is {least:g}; raise it")
    scheme = "shared" if shared or not policy.per_exit else "per_exit"
    return _calibrated(policy.with_certainties(thresholds.tolist()), logits, labels, costs, scheme, budget)


def calibrate_accuracy_drop(
    policy: ExitPolicy,
    logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    drop: float,
    *,
    shared: bool = False,
    split: str = "val",
) -> Calibrated:
    """Choose the thresholds of least mean cost whose accuracy is at least the last exit's less ``drop``.

    They are searched as in :func:`calibrate_budget`.

    Args:
        policy: Its temperatures stay as they are; its thresholds do not matter.
        logits: Every exit's own logits (E, B, C).
        labels: int64 (B,).
        costs: Cumulative cost of leaving at each exit, E numbers in any unit.
        drop: Accuracy that may be lost, 0 to 1; one percentage point is 0.01.
        shared: One threshold for all exits instead of one each.
        split: Where the logits are from; ``test`` is refused.

    Raises:
        ValueError: ``drop`` is out of range, the split is the test split, or a shape or value is not what it must be.

    Example:
        >>> from cleave.deployment import build_policy
        >>> logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])
        >>> policy = build_policy("confidence", 1.0, exits=2)
        >>> calibrate_accuracy_drop(policy, logits, torch.tensor([0, 1]), costs=[1, 4], drop=0.5).cost
        1.0
    """
    check_split(split)
    table = _table(policy, logits, labels, costs)
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must be from 0 to 1, got {drop}; one percentage point is 0.01")
    needed = math.ceil(table.right[-1].sum() - drop * table.samples - 1e-9)
    thresholds = _search(policy, table, at_least_right(needed), shared)
    assert thresholds is not None  # leaving nowhere is always allowed
    scheme = "shared" if shared or not policy.per_exit else "per_exit"
    return _calibrated(policy.with_certainties(thresholds.tolist()), logits, labels, costs, scheme, None)


def budgeted_batch(
    policy: ExitPolicy,
    logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    budget: float,
    *,
    split: str = "val",
) -> Calibrated:
    r"""Choose thresholds such that a fixed, geometrically falling share of samples leaves at each exit.

    .. math:: q_k = z (1 - q)^{k - 1} q, \quad \sum_k q_k = 1, \quad \sum_k q_k C_k = \text{budget}

    This is the budgeted batch classification of Huang, Chen, Li, Wu, van der Maaten and Weinberger, "Multi-Scale Dense
    Networks for Resource Efficient Image Classification", 2018, sec. 5. Thresholds are the quantiles of the scores of
    those that got so far. Shares are met up to 1/B, rounded towards early exits; where scores are equal, more leave.

    Args:
        policy: One whose exits may each have a threshold of their own; patience, a whole number, cannot meet a share.
        logits: Every exit's own logits (E, B, C).
        labels: int64 (B,); only the accuracy that is reported depends on them.
        costs: Cumulative cost of leaving at each exit, E numbers in any unit.
        budget: Mean cost per sample, in the same unit.
        split: Where the logits are from; ``test`` is refused.

    Raises:
        ValueError: The budget is below the first exit's cost, the policy has no threshold per exit, the split is the
            test split, or a shape or value is not what it must be.

    Example:
        >>> from cleave.deployment import build_policy
        >>> logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])
        >>> policy = build_policy("confidence", 1.0, exits=2)
        >>> budgeted_batch(policy, logits, torch.tensor([0, 1]), costs=[1, 4], budget=2.5).shares
        (0.5, 0.5)
    """
    check_split(split)
    if not policy.per_exit:
        raise ValueError(
            f"budgeted_batch sets a threshold per exit, which {policy.kind} does not have; use calibrate_budget"
        )
    table = _table(policy, logits, labels, costs)
    check_budget(budget)
    if budget * ROUNDING < table.costs[0]:
        raise ValueError(f"budget={budget:g} cannot be kept: the least possible is {table.costs[0]:g}; raise it")
    thresholds = geometric_thresholds(table, budget)
    return _calibrated(policy.with_certainties(thresholds.tolist()), logits, labels, costs, "budgeted_batch", budget)


def cost_curve(
    policy: ExitPolicy,
    logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    points: int = 101,
    *,
    shared: bool = True,
    split: str = "val",
) -> list[CurvePoint]:
    """Return what the policy achieves over all its thresholds, from the cheapest to the dearest setting.

    With one shared threshold nothing is fitted: the curve runs over evenly spaced quantiles of the scores, or over all
    thresholds of a policy that has but a few, and may be drawn on any split. With thresholds per exit each point is
    calibrated at one of evenly spaced budgets, which the test split is not for; draw those with
    :func:`~cleave.planning.exit_statistics.measure`.

    Args:
        policy: Its temperatures stay as they are; its thresholds do not matter.
        logits: Every exit's own logits (E, B, C).
        labels: int64 (B,).
        costs: Cumulative cost of leaving at each exit, E numbers in any unit.
        points: Largest number of points, at least 2; both ends are among them.
        shared: One threshold for all exits, or one each.
        split: Where the logits are from.

    Raises:
        ValueError: A shape or value is not what it must be, or thresholds per exit are asked for on the test split.

    Example:
        >>> from cleave.deployment import build_policy
        >>> logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])
        >>> policy = build_policy("confidence", 1.0, exits=2)
        >>> [(p.cost, p.accuracy) for p in cost_curve(policy, logits, torch.tensor([0, 1]), costs=[1, 4])]
        [(1.0, 0.5), (2.5, 1.0), (4.0, 1.0)]
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points must be a whole number of at least 2, got {points!r}")
    table = _table(policy, logits, labels, costs)
    if not shared and policy.per_exit:
        check_split(split)
        budgets = np.linspace(table.costs[0], table.costs[-1], points)
        found = [_search(policy, table, within_budget(table, budget), shared=False) for budget in budgets]
        return [measure(policy.with_certainties(t.tolist()), logits, labels, costs) for t in found if t is not None]
    swept = sweep(table, policy.candidates())
    last = len(swept.thresholds) - 1
    chosen = np.unique(np.linspace(0, last, min(points, last + 1)).round().astype(int))
    return [
        CurvePoint(
            policy.with_certainties([float(swept.thresholds[i])] * len(table.scores)).thresholds,
            float(swept.right[i]) / table.samples,
            float(swept.cost[i]) / table.samples,
            tuple((swept.shares[:, i] / table.samples).tolist()),
        )
        for i in chosen
    ]


def check_budget(budget: float) -> None:
    """Refuse a budget that is no number; infinity is one."""
    if math.isnan(budget):
        raise ValueError("budget must be a number in the unit of the costs, got NaN")


@torch.no_grad()
def _table(policy: ExitPolicy, logits: Tensor, labels: Tensor, costs: Sequence[float]) -> Table:
    check_logits(logits, labels)
    if policy.latest is not None:
        raise ValueError(
            f"the policy has a deadline at exit {policy.latest}; calibrate it first, then set the deadline"
        )
    if len(logits) < 2:
        raise ValueError("logits hold one exit, so there is no threshold to choose; pass (E, B, C) of at least 2 exits")
    values = check_costs(costs, len(logits))
    right = decisions(policy, logits).answers.argmax(2) == labels
    certainties = policy.certainties(logits)[:-1].double().cpu().numpy()
    return Table(certainties, right.cpu().numpy().astype(np.int64), values)


def _search(policy: ExitPolicy, table: Table, goal: Goal, shared: bool) -> Floats | None:
    """Return the thresholds (E - 1,) that reach the goal best, ``None`` if none does."""
    swept = sweep(table, policy.candidates())
    best = goal(swept.right, swept.cost)
    if best is None:
        return None
    start = np.full(len(table.scores), swept.thresholds[best])
    return start if shared or not policy.per_exit else per_exit(table, goal, start)


def _calibrated(
    policy: ExitPolicy, logits: Tensor, labels: Tensor, costs: Sequence[float], scheme: str, budget: float | None
) -> Calibrated:
    point = measure(policy, logits, labels, costs)
    return Calibrated(policy, point.accuracy, point.cost, point.shares, scheme, budget)
