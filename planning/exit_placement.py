"""Where exits should stand: the k of N candidates with the best accuracy within a cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cleave.deployment import ExitPolicy
from cleave.planning.stored_logits import check_logits, decisions


@dataclass(frozen=True)
class Placement:
    """A choice among candidate exits, and what it achieves on the samples that it was made on.

    Attributes:
        exits: The chosen candidates, 0 to N - 1, in order.
        accuracy: Share of samples that are answered rightly, 0 to 1.
        cost: Mean over samples, in the unit of the costs.
        exact: Whether it is proven that no other choice is better.
    """

    exits: tuple[int, ...]
    accuracy: float
    cost: float
    exact: bool


def exit_bits(policy: ExitPolicy, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Read off stored logits what :func:`place_exits` chooses by.

    Args:
        policy: One that looks at each exit alone: confidence, entropy or margin. Its thresholds stay as they are.
        logits: Logits of all candidates and of the final classifier (N + 1, B, C), of one run with exits everywhere.
        labels: int64 (B,).

    Returns:
        Which samples each exit answers rightly (N + 1, B), and which would leave at each candidate (N, B).

    Raises:
        ValueError: What the policy decides at an exit depends on which others exist, as state or a deadline makes it;
            a shape or value is not what it must be.

    Example:
        >>> from cleave.deployment import build_policy
        >>> logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])
        >>> correct, leaves = exit_bits(build_policy("confidence", 0.9, exits=2), logits, torch.tensor([0, 1]))
        >>> correct.tolist(), leaves.tolist()
        ([[True, False], [True, True]], [[True, False]])
    """
    if policy.carries or policy.latest is not None:
        raise ValueError(
            f"what the {policy.kind} policy decides at an exit depends on which others exist; choose confidence, "
            "entropy or margin, without a deadline"
        )
    check_logits(logits, labels)
    found = decisions(policy, logits)
    return found.answers.argmax(2) == labels, found.leaves[:-1]


def place_exits(
    correct: Tensor,
    leaves: Tensor,
    stage_costs: Sequence[float],
    head_costs: Sequence[float],
    count: int,
    budget: float = math.inf,
    *,
    exhaustive_up_to: int = 20_000,
) -> Placement:
    r"""Choose the exits that answer most samples rightly at a mean cost within the budget.

    A sample leaves at the first chosen exit j whose head would let it go, and costs

    .. math:: \sum_{i \le j} s_i + \sum_{i \le j,\; i \text{ chosen}} h_i

    with s the stages' costs and h the heads'. The problem is that of Chiang, Liu, Wang, Hong and Wu, "Optimal Branch
    Location for Cost-effective Inference on Branchynet", 2021, who show it to be NP-complete and solve it by a dynamic
    programme in pseudo-polynomial time. Here a state is the last chosen exit and how many were chosen; it holds every
    pair of right answers and cost that no other pair beats in both, at most B + 1 of them, so that nothing is rounded
    and integer costs are exact.

    This is the optimum where decisions are **nested**: who would leave at a candidate would leave at every later one
    too. Then which samples remain is a matter of the last exit alone, and pairs can be compared. Otherwise every
    choice is looked at as long as there are at most ``exhaustive_up_to``; beyond, the dynamic programme is a heuristic:
    ``exact`` is false, and accuracy and cost are still those of the choice itself, within the budget.
    ``benchmarks/exit_placement.py`` measures how far it is from the optimum.

    Args:
        correct: bool (N + 1, B): whether each candidate, in order, and last the final classifier would be right.
        leaves: bool (N, B): whether a sample would leave at each candidate.
        stage_costs: N + 1 costs: from the input to the first candidate, on to the next, at last to the final logits.
        head_costs: Cost of each candidate's own head, N numbers.
        count: How many exits to choose, 1 to N; the final classifier does not count.
        budget: Largest mean cost per sample.
        exhaustive_up_to: Largest number of choices to look at one by one where decisions are not nested.

    Raises:
        ValueError: A shape or value is not what it must be; no choice found keeps within the budget.

    Example:
        >>> correct = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
        >>> leaves = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
        >>> place_exits(correct, leaves, stage_costs=[10, 10, 10], head_costs=[1, 1], count=1)
        Placement(exits=(1,), accuracy=1.0, cost=23.5, exact=True)
        >>> place_exits(correct, leaves, stage_costs=[10, 10, 10], head_costs=[1, 1], count=1, budget=22)
        Placement(exits=(0,), accuracy=0.75, cost=21.0, exact=True)
    """
    candidates = _Candidates.read(correct, leaves, stage_costs, head_costs)
    total = len(candidates.heads)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= total:
        raise ValueError(f"count must be a whole number of 1 to {total}, the number of candidates; got {count!r}")
    if math.isnan(budget):
        raise ValueError("budget must be a number, got NaN")
    nested = not (leaves[:-1] & ~leaves[1:]).any()
    prune = nested or math.comb(total, count) > exhaustive_up_to
    found = list(_choices(candidates, count, prune))
    batch = correct.shape[1]
    limit = budget * batch * (1 + 1e-12)  # so that a mean cost passed on as the budget is kept in spite of rounding
    allowed = [choice for choice in found if choice.cost <= limit]
    if not allowed:
        least = min(choice.cost for choice in found) / batch
        raise ValueError(f"no choice of {count} exits found keeps to budget={budget:g}; the cheapest costs {least:g}")
    best = max(allowed, key=lambda choice: (choice.right, -choice.cost))
    return Placement(best.exits, best.right / batch, best.cost / batch, exact=nested or not prune)


@dataclass(frozen=True)
class _Candidates:
    """Samples as the bits of whole numbers: sets of thousands intersect and are counted in a microsecond."""

    right: list[int]
    leaves: list[int]
    reach: list[float]
    heads: list[float]
    everyone: int

    @classmethod
    def read(
        cls, correct: Tensor, leaves: Tensor, stage_costs: Sequence[float], head_costs: Sequence[float]
    ) -> _Candidates:
        if leaves.ndim != 2 or 0 in leaves.shape or correct.shape != (len(leaves) + 1, leaves.shape[1]):
            raise ValueError(
                "correct must be (N + 1, B), candidates and final classifier, and leaves (N, B); "
                f"got {list(correct.shape)} and {list(leaves.shape)}"
            )
        if correct.dtype != torch.bool or leaves.dtype != torch.bool:
            raise ValueError(f"correct and leaves must be bool, got {correct.dtype} and {leaves.dtype}")
        needs = (("stage_costs", stage_costs, len(correct)), ("head_costs", head_costs, len(leaves)))
        for name, costs, needed in needs:
            if len(costs) != needed or not all(math.isfinite(cost) and cost >= 0 for cost in costs):
                raise ValueError(f"{name} must be {needed} numbers of at least 0, got {list(costs)}")
        # Whole numbers of NumPy would overflow where Python's do not.
        stages, heads = ([c if isinstance(c, float) else int(c) for c in costs] for costs in (stage_costs, head_costs))
        reach = [sum(stages[: i + 1]) for i in range(len(stages))]
        return cls(_bits(correct), _bits(leaves), reach, heads, (1 << leaves.shape[1]) - 1)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Exits chosen so far, with the outcome of all samples if no other followed but the final classifier.

    ``right`` and ``cost`` are that outcome; ``remain`` are the samples that go on behind the last exit.
    """

    exits: tuple[int, ...]
    right: int
    cost: float
    remain: int


def _choices(candidates: _Candidates, count: int, prune: bool) -> Iterator[_Choice]:
    """Yield every choice of ``count`` exits, or with ``prune`` those that none with the same last exit beats."""
    everyone = candidates.everyone
    cost = everyone.bit_count() * candidates.reach[-1]
    level = {-1: [_Choice((), (everyone & candidates.right[-1]).bit_count(), cost, everyone)]}
    for chosen in range(count):
        # Behind exit j, count - chosen - 1 more must find a place.
        last = len(candidates.heads) - (count - chosen)
        extended = {
            j: [_extend(candidates, choice, j) for i, choices in level.items() if i < j for choice in choices]
            for j in range(chosen, last + 1)
        }
        level = {j: _undominated(choices) if prune else choices for j, choices in extended.items()}
    for choices in level.values():
        yield from choices


def _extend(candidates: _Candidates, choice: _Choice, j: int) -> _Choice:
    """Add exit j behind the others: all that remain pay its head, and those who leave there save the rest."""
    leaving = choice.remain & candidates.leaves[j]
    won = (leaving & candidates.right[j]).bit_count() - (leaving & candidates.right[-1]).bit_count()
    paid = choice.remain.bit_count() * candidates.heads[j]
    saved = leaving.bit_count() * (candidates.reach[-1] - candidates.reach[j])
    return _Choice((*choice.exits, j), choice.right + won, choice.cost + paid - saved, choice.remain & ~leaving)


def _undominated(choices: list[_Choice]) -> list[_Choice]:
    """Keep those choices than which none is at least as right for at most the cost."""
    kept: list[_Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, -choice.right)):
        if not kept or choice.right > kept[-1].right:
            kept.append(choice)
    return kept


def _bits(rows: Tensor) -> list[int]:
    return [int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little") for row in rows.cpu().numpy()]
