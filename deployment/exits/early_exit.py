"""Answering as early as a policy allows: on the way through a network, or afterwards on stored logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .policies import ConfidencePolicy
from .policy import ExitPolicy, checked_costs

Step = Callable[[dict[str, Tensor]], tuple[Tensor | None, dict[str, Tensor]]]


class Exited(NamedTuple):
    """What a policy answered for B samples.

    Attributes:
        logits: The answers (B, C).
        index: The exit where each sample left, int64 (B,), 0 to E - 1.
    """

    logits: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name


def offline(policy: ExitPolicy, logits: Tensor) -> Exited:
    """Answer by stored logits of all exits, exactly as :func:`leave_early` would.

    Args:
        policy: Decides at each exit.
        logits: Every exit's own logits (E, B, C).

    Returns:
        The answers and where each sample left.

    Raises:
        ValueError: The logits are not finite floats (E, B, C) of the policy's exits.

    Example:
        >>> from cleave.deployment import build_policy
        >>> logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])
        >>> exited = offline(build_policy("confidence", 0.9, exits=2), logits)
        >>> exited.index.tolist(), exited.logits.argmax(1).tolist()
        ([0, 1], [0, 1])
    """
    policy.check(logits)
    _, batch, classes = logits.shape
    state = policy.start(batch, classes, logits[0])
    answers = torch.zeros_like(logits[0])
    index = torch.full((batch,), -1, dtype=torch.int64, device=logits.device)
    for i, own in enumerate(logits):
        answer, leave, state = policy.decide(i, own, state)
        leaving = leave & (index < 0)
        answers = torch.where(leaving.unsqueeze(1), answer, answers)
        index = torch.where(leaving, i, index)
    return Exited(answers, index)


def leave_early(steps: Sequence[Step], carried: dict[str, Tensor], policy: ExitPolicy) -> Exited:
    """Run a network step by step; samples that leave are taken out, and only the others go on.

    A step that no sample reaches is not called. Where all go on, nothing is copied.

    Args:
        steps: Each takes the tensors that the step before carried on, one row a sample that is still there, and returns
            the logits of its exit (B', C), or ``None`` where it has none, and what to carry on. The last step has
            the last exit.
        carried: What the first step takes, tensors whose first dimension is B.
        policy: Decides at each exit.

    Returns:
        The answers and where each sample left, in the order of the inputs.

    Raises:
        ValueError: The steps have fewer or more exits than the policy, as far as samples get; what a step returns has
            not one row for each sample; or the policy refuses the logits.

    Example:
        >>> from cleave.deployment import build_policy
        >>> def first(carried):
        ...     return carried["x"], {"x": 10 * carried["x"]}
        >>> def second(carried):
        ...     print(len(carried["x"]), "left")
        ...     return carried["x"], {}
        >>> x = torch.tensor([[4.0, 0.0], [0.1, 0.0]])
        >>> leave_early([first, second], {"x": x}, build_policy("confidence", 0.9, exits=2)).index
        1 left
        tensor([0, 1])
    """
    if policy.exits > len(steps):
        raise ValueError(f"the policy has {policy.exits} exits, but there are only {len(steps)} steps")
    rows, exits = torch.arange(_samples(carried)), 0
    state: dict[str, Tensor] = {}
    left: list[tuple[Tensor, Exited]] = []
    for number, step in enumerate(steps, 1):
        logits, carried = step(carried)
        _check_rows(number, carried, len(rows))
        if logits is None:
            continue
        _check_rows(number, {"logits": logits}, len(rows))
        if exits == policy.exits - 1 and number < len(steps):
            last = f"step {number} of {len(steps)} has the last of them"
            raise ValueError(f"the policy has {policy.exits} exits, but {last}; give a threshold for each one before")
        if exits == 0:
            state = policy.start(len(rows), logits.shape[-1], logits)
        answer, leave, state = policy.decide(exits, logits, state)
        stay = (~leave).nonzero().squeeze(1)
        if len(stay) < len(rows) or not len(rows):
            gone = leave.nonzero().squeeze(1)
            left.append((rows.to(gone.device)[gone], Exited(answer[gone], torch.full_like(gone, exits))))
            if not len(stay):
                return _in_order(left)
            rows, carried, state = rows.to(stay.device)[stay], _taken(carried, stay), _taken(state, stay)
        exits += 1
    raise ValueError(f"the policy has {policy.exits} exits, the last one among them, but the steps have only {exits}")


def anytime(logits: Tensor, costs: Sequence[float], budget: float, policy: ExitPolicy | None = None) -> Tensor:
    """Return the best answers there are when a budget is spent: those of the last exit that fits into it.

    The setting of anytime prediction of Huang, Chen, Li, Wu, van der Maaten and Weinberger, "Multi-Scale Dense Networks
    for Resource Efficient Image Classification", 2018.

    Args:
        logits: Every exit's own logits (E, B, C).
        costs: Cumulative cost of leaving at each exit, E numbers: MACs, seconds or any other unit.
        budget: What a sample may cost, in the same unit.
        policy: Says what an exit answers, such as an ensemble; its thresholds do not matter. ``None``: its own logits.

    Returns:
        The answers (B, C).

    Raises:
        ValueError: The budget is below the first exit's cost, or a shape or value is not what it must be.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.5]], [[3.0, 0.0]], [[4.0, 0.0]]])
        >>> anytime(logits, costs=[1, 5, 9], budget=8)
        tensor([[3., 0.]])
    """
    policy = ConfidencePolicy((None,) * (len(logits) - 1)) if policy is None else policy.with_thresholds(None)
    return offline(policy.with_deadline(budget, costs), logits).logits


def expected_cost(index: Tensor, costs: Sequence[float]) -> float:
    """Return the mean cost of samples by where each one left.

    Args:
        index: int64 (B,), as in :class:`Exited`.
        costs: Cumulative cost of leaving at each exit, E numbers in any unit.

    Raises:
        ValueError: ``index`` is empty or names an exit that is not there, or the costs are not positive and rising.

    Example:
        >>> expected_cost(torch.tensor([0, 0, 2, 0]), costs=[1, 5, 9])
        3.0
    """
    shares = exit_shares(index, len(costs))
    return math.fsum(share * cost for share, cost in zip(shares, checked_costs(costs, len(costs)), strict=True))


def exit_shares(index: Tensor, exits: int) -> list[float]:
    """Return the share of samples that left at each of E exits, from where each one left (B,); they add up to 1.

    Raises:
        ValueError: ``index`` is empty or names an exit that is not there.

    Example:
        >>> exit_shares(torch.tensor([0, 0, 2, 0]), exits=3)
        [0.75, 0.0, 0.25]
    """
    if index.ndim != 1 or index.dtype != torch.int64 or not len(index) or index.min() < 0 or index.max() >= exits:
        raise ValueError(f"index must be int64 (B,) of 0 to {exits - 1}, the exit where each sample left; got {index}")
    return (torch.bincount(index.cpu(), minlength=exits).double() / len(index)).tolist()


def _samples(carried: Mapping[str, Tensor]) -> int:
    if not carried or any(not tensor.ndim for tensor in carried.values()):
        raise ValueError(f"carried must hold tensors with one row a sample, got {_shapes(carried)}")
    if len({len(tensor) for tensor in carried.values()}) > 1:
        raise ValueError(f"carried must hold as many rows in each tensor, one a sample, got {_shapes(carried)}")
    return len(next(iter(carried.values())))


def _check_rows(number: int, tensors: Mapping[str, Tensor], samples: int) -> None:
    if any(not tensor.ndim or len(tensor) != samples for tensor in tensors.values()):
        raise ValueError(f"step {number} must return one row for each of {samples} samples, got {_shapes(tensors)}")


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "none"


def _taken(tensors: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: tensor[rows.to(tensor.device)] for name, tensor in tensors.items()}


def _in_order(left: Sequence[tuple[Tensor, Exited]]) -> Exited:
    """Put the answers of samples that left one group after another back into the order of their rows."""
    if len(classes := {exited.logits.shape[1] for _, exited in left}) > 1:
        raise ValueError(f"the exits must answer with the same classes, got {sorted(classes)} of them")
    back = torch.cat([rows for rows, _ in left]).argsort()
    return Exited(*(torch.cat(parts)[back] for parts in zip(*(exited for _, exited in left), strict=True)))
