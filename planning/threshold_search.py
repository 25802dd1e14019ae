"""The search behind calibration: thresholds that reach a goal on a table of scores.

Scores here always rise with certainty, and a sample leaves at the first exit where its score is at least the threshold;
no score reaches a threshold of infinity. Costs are totals over all samples, so that whole numbers stay exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cleave.planning.stored_logits import Floats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
# From the number of right answers and the total cost of many settings to the place of the best, None if none will do.
Goal = Callable[[Floats, Floats], int | None]

LEAST_GRID, MOST_GRID, SAMPLES_A_STEP = 4, 32, 32
ROUNDS = 50
ROUNDING = 1 + 1e-12


@dataclass(frozen=True)
class Table:
    """Stored decisions.

    Attributes:
        scores: Score of each sample at each early exit (E - 1, B).
        right: 1 where an exit answers rightly, else 0 (E, B).
        costs: Cumulative cost of leaving at each exit (E,).
    """

    scores: Floats
    right: Ints
    costs: Floats

    @property
    def samples(self) -> int:
        """Number of samples B."""
        return self.right.shape[1]


@dataclass(frozen=True)
class Sweep:
    """What each of T thresholds, shared by all early exits, achieves.

    Attributes:
        thresholds: (T,), rising.
        shares: Number of samples that leave at each exit (E, T).
        right: Number of right answers (T,).
        cost: Total cost (T,).
    """

    thresholds: Floats
    shares: Ints
    right: Floats
    cost: Floats


def within_budget(table: Table, budget: float) -> Goal:
    """Aim for most right answers, then least cost, at a mean cost within the budget."""
    limit = budget * table.samples * ROUNDING

    def best(right: Floats, cost: Floats) -> int | None:
        return _first(cost <= limit, -right, cost)

    return best


def at_least_right(needed: int) -> Goal:
    """Aim for least cost, then most right answers, with at least so many right answers."""

    def best(right: Floats, cost: Floats) -> int | None:
        return _first(right >= needed, cost, -right)

    return best


def sweep(table: Table, thresholds: Iterable[float] | None = None) -> Sweep:
    """Measure shared thresholds, by default one for each outcome that there is.

    A sample passes exit e iff its largest score so far is below the threshold, so that sorting these once per exit
    answers for all thresholds.
    """
    largest = np.maximum.accumulate(table.scores, axis=0)
    chosen = np.unique([*largest.ravel(), math.inf] if thresholds is None else list(thresholds))
    passing = np.zeros((len(table.costs) + 1, len(chosen)), dtype=np.int64)
    passing[0] = table.samples
    right = np.full(len(chosen), float(table.right[0].sum()))
    for e, scores in enumerate(largest):
        order = scores.argsort()
        passing[e + 1] = scores[order].searchsorted(chosen)
        gained = (table.right[e + 1] - table.right[e])[order]
        right += np.concatenate([[0], gained.cumsum()])[passing[e + 1]]
    shares = passing[:-1] - passing[1:]
    return Sweep(chosen, shares, right, table.costs @ shares)


def geometric_shares(costs: Floats, budget: float) -> Floats:
    r"""Return the shares of samples to leave at each exit that spend the budget exactly.

    .. math:: q_k = z (1 - q)^{k - 1} q, \quad \sum_k q_k = 1, \quad \sum_k q_k C_k = \text{budget}

    (Huang, Chen, Li, Wu, van der Maaten and Weinberger, "Multi-Scale Dense Networks for Resource Efficient Image
    Classification", 2018, sec. 5), q found by bisection. As in the authors' code the ratio 1 - q may exceed 1, without
    which no budget above the mean of the costs could be spent.

    Args:
        costs: Cumulative cost of leaving at each exit (E,).
        budget: At least the first cost; from the last one on, all samples go to the last exit.
    """
    k = np.arange(len(costs))

    def shares(log_ratio: float) -> Floats:
        weights = np.exp(log_ratio * k - max(log_ratio * k[-1], 0))
        return weights / weights.sum()

    if budget >= costs[-1]:
        return (k == k[-1]).astype(np.float64)
    low, high = -700.0, 700.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle) @ costs < budget else (low, middle)
    return shares(low)


def geometric_thresholds(table: Table, budget: float) -> Floats:
    """Return thresholds (E - 1,) by which the geometric shares leave, or more where scores are equal."""
    remain = np.arange(table.samples)
    # Rounded up, so that more leave early than asked, not fewer, and the budget is kept.
    goals = np.ceil(geometric_shares(table.costs, budget).cumsum() * table.samples - 1e-9).astype(int)
    thresholds = np.full(len(table.scores), math.inf)
    for e, scores in enumerate(table.scores):
        leaving = goals[e] - (table.samples - len(remain))
        if leaving > 0:
            own = scores[remain]
            thresholds[e] = np.partition(own, len(own) - leaving)[len(own) - leaving]
            remain = remain[own < thresholds[e]]
    return thresholds


def per_exit(table: Table, goal: Goal, start: Floats) -> Floats:
    """Return thresholds of their own for each exit, at least as good as ``start`` and as the geometric ones.

    Pairs of exits take turns: both thresholds of a pair are set to the best of all combinations, while the others
    stay, until no pair can be improved. What one exit saves another can thus spend, which steps along single
    thresholds could not do at the edge of a budget. Thresholds are quantiles of the scores, 4 to 32 an exit, as many as
    leave 32 samples between two of them, beside those of the starts: enough to choose from, too few to fit single
    samples.
    """
    geometric = np.array([geometric_thresholds(table, b) for b in np.linspace(table.costs[0], table.costs[-1], 33)])
    best = goal(*_totals(table, geometric))
    starts = [start] if best is None else [start, geometric[best]]
    grid = min(max(table.samples // SAMPLES_A_STEP, LEAST_GRID), MOST_GRID)
    quantiles = np.quantile(table.scores, np.arange(grid) / grid, axis=1, method="higher").T
    grids = [np.unique([*own, *(s[e] for s in starts), math.inf]) for e, own in enumerate(quantiles)]
    ends = np.array([start, *(_take_turns(table, goal, grids, thresholds) for thresholds in starts)])
    best = goal(*_totals(table, ends))
    return start if best is None else ends[best]


def _take_turns(table: Table, goal: Goal, grids: list[Floats], start: Floats) -> Floats:
    # A sample of level l leaves at all thresholds of the grid before the l-th.
    levels = np.array([grid.searchsorted(own, "right") for grid, own in zip(grids, table.scores, strict=True)])
    chosen = np.array([int(grid.searchsorted(t)) for grid, t in zip(grids, start, strict=True)])
    sizes = [len(grid) for grid in grids]
    for _ in range(ROUNDS):
        before = chosen.copy()
        for e, f in itertools.combinations(range(len(grids)), 2):
            right, cost = _pair(table, levels, chosen, e, f, sizes)
            best = goal(right.ravel(), cost.ravel())
            if best is not None:
                new, now = np.unravel_index(best, right.shape), (chosen[e], chosen[f])
                if right[new] != right[now] or cost[new] < cost[now]:
                    chosen[[e, f]] = new
        if (chosen == before).all():
            break
    return np.array([grid[i] for grid, i in zip(grids, chosen, strict=True)])


def _pair(table: Table, levels: Ints, chosen: Ints, e: int, f: int, sizes: list[int]) -> tuple[Floats, Floats]:
    """Return right answers and total cost for all combinations of the thresholds of exits e < f, the others fixed."""
    leaves = levels > chosen[:, None]
    others = np.delete(np.arange(len(table.costs)), [e, f])
    rest = others[_first_exit(np.delete(leaves, [e, f], axis=0))]  # where samples leave that do so neither at e nor f
    before, between = rest < e, (rest > e) & (rest < f)
    column, row = np.arange(table.samples), (levels[e], levels[f])
    shape = (sizes[e] + 1, sizes[f] + 1)

    def totals(values: Floats) -> Floats:
        own = values[rest, column]
        at_e, at_f = np.where(before, own, values[e]), np.where(before | between, own, values[f])
        # A level above the threshold leaves: sums over higher levels, and over the others.
        e_leaves, f_leaves, neither = (_histogram(row, v, shape) for v in (at_e, at_f, own))
        above_e = e_leaves.sum(1)[::-1].cumsum()[::-1][1:]
        f_below_e, below_e = f_leaves.cumsum(0)[:-1], neither.cumsum(0)[:-1]
        above_f = f_below_e[:, ::-1].cumsum(1)[:, ::-1][:, 1:]
        return above_e[:, None] + above_f + below_e.cumsum(1)[:, :-1]

    spent = np.broadcast_to(table.costs[:, None], table.right.shape)
    return totals(table.right.astype(np.float64)), totals(spent)


def _histogram(row: tuple[Ints, Ints], values: Floats, shape: tuple[int, int]) -> Floats:
    flat = np.bincount(row[0] * shape[1] + row[1], values, shape[0] * shape[1])
    return flat.astype(np.float64, copy=False).reshape(shape)


def _totals(table: Table, thresholds: Floats) -> tuple[Floats, Floats]:
    """Return right answers and total cost of each row of thresholds (S, E - 1)."""
    found = [_first_exit(table.scores >= row[:, None]) for row in thresholds]
    column = np.arange(table.samples)
    right = np.array([float(table.right[index, column].sum()) for index in found])
    return right, np.array([table.costs[index].sum() for index in found])


def _first_exit(leaves: Bools) -> Ints:
    """Return the first exit where each sample leaves, the one behind the last where it leaves at none."""
    last = np.ones((1, leaves.shape[1]), dtype=bool)
    return np.concatenate([leaves, last]).argmax(0)


def _first(allowed: Bools, major: Floats, minor: Floats) -> int | None:
    """Return the place of the least ``major``, then the least ``minor``, among those allowed."""
    if not allowed.any():
        return None
    major = np.where(allowed, major, math.inf)
    return int(np.where(major == major.min(), minor, math.inf).argmin())
