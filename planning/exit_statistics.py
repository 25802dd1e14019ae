"""What a report says of early exits: accuracy, calibration, shares and overthinking, on stored logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cleave.deployment import ExitPolicy, exit_shares, expected_cost, offline
from cleave.planning.stored_logits import check_costs, check_logits


@dataclass(frozen=True)
class CurvePoint:
    """What one setting of a policy achieves.

    Attributes:
        thresholds: One per early exit; ``None``: none leaves there.
        accuracy: Share of samples that are answered rightly, 0 to 1.
        cost: Mean over samples, in the unit of the costs.
        shares: Share of samples that leave at each exit; they add up to 1.
    """

    thresholds: tuple[float | None, ...]
    accuracy: float
    cost: float
    shares: tuple[float, ...]


@torch.no_grad()
def measure(policy: ExitPolicy, logits: Tensor, labels: Tensor, costs: Sequence[float]) -> CurvePoint:
    """Measure a policy, thresholds and all, on stored logits.

    Args:
        policy: Decides at each exit.
        logits: Every exit's own logits (E, B, C).
        labels: int64 (B,).
        costs: Cumulative cost of leaving at each exit, E numbers in any unit.

    Raises:
        ValueError: A shape or value is not what it must be.

    Example:
        >>> from cleave.deployment import build_policy
        >>> logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])
        >>> point = measure(build_policy("confidence", 0.9, exits=2), logits, torch.tensor([0, 1]), [1.0, 4.0])
        >>> point.accuracy, point.cost, point.shares
        (1.0, 2.5, (0.5, 0.5))
    """
    check_logits(logits, labels)
    values = check_costs(costs, len(logits))
    exited = offline(policy, logits)
    accuracy = (exited.logits.argmax(1) == labels).double().mean().item()
    shares = tuple(exit_shares(exited.index, len(logits)))
    return CurvePoint(policy.thresholds, accuracy, expected_cost(exited.index, values.tolist()), shares)


def exit_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Return the accuracy of each exit if all samples left there; logits (E, B, C), labels (B,).

    Raises:
        ValueError: A shape or value is not what it must be.

    Example:
        >>> exit_accuracy(torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([0, 1]))
        (0.5, 1.0)
    """
    check_logits(logits, labels)
    return tuple((logits.argmax(2) == labels).double().mean(1).tolist())


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> tuple[float, ...]:
    r"""Return each exit's expected calibration error: how far its confidence is from its accuracy.

    .. math:: \mathrm{ECE} = \sum_{m=1}^{M} \frac{|B_m|}{n} \left| \mathrm{acc}(B_m) - \mathrm{conf}(B_m) \right|

    where :math:`B_m` are the samples whose largest probability lies in ((m − 1) / M, m / M]: eq. 3 of Guo, Pleiss, Sun
    and Weinberger, "On Calibration of Modern Neural Networks", 2017.

    Args:
        logits: Every exit's answer (E, B, C).
        labels: int64 (B,).
        bins: M.

    Raises:
        ValueError: A shape or value is not what it must be.

    Example:
        >>> calibration_error(torch.zeros(1, 4, 2), torch.tensor([0, 1, 0, 1]))  # unsure, and right in half the cases
        (0.0,)
    """
    check_logits(logits, labels)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")
    errors = []
    for own in logits.double():
        confidence, answer = own.softmax(1).max(1)
        place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
        surplus = (answer == labels).double() - confidence
        errors.append(torch.bincount(place, surplus, bins).abs().sum().item() / len(labels))
    return tuple(errors)


@dataclass(frozen=True)
class Overthinking:
    """How much would be won if each sample left at the right place.

    Attributes:
        destructive: Share of samples that an early exit answers rightly and the last one wrongly.
        wasteful: Share of samples that the last exit answers rightly and an early one did already.
        oracle_accuracy: Share of samples that any exit answers rightly.
        oracle_cost: Mean cost if each sample left at the first exit that is right, and at the last where none is.
    """

    destructive: float
    wasteful: float
    oracle_accuracy: float
    oracle_cost: float


def overthinking(logits: Tensor, labels: Tensor, costs: Sequence[float]) -> Overthinking:
    """Measure overthinking: answers that were right before the end (Kaya, Hong and Dumitraş 2019).

    "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking" calls it wasteful where later layers
    only confirm what was right, and destructive where they undo it. The oracle knows which exits are right; it bounds
    what any policy can achieve on these logits.

    Args:
        logits: Every exit's answer (E, B, C).
        labels: int64 (B,).
        costs: Cumulative cost of leaving at each exit, E numbers in any unit.

    Raises:
        ValueError: A shape or value is not what it must be.

    Example:
        >>> logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> overthinking(logits, torch.tensor([0, 0]), [1, 3])
        Overthinking(destructive=0.5, wasteful=0.5, oracle_accuracy=1.0, oracle_cost=1.0)
    """
    check_logits(logits, labels)
    values = torch.from_numpy(check_costs(costs, len(logits)))
    right = (logits.argmax(2) == labels).cpu()
    early, last = right[:-1].any(0), right[-1]
    # argmax finds the first of equal values; the last exit stands in where none is right.
    first = torch.cat([right[:-1], torch.ones_like(right[-1:])]).long().argmax(0)
    return Overthinking(
        destructive=(early & ~last).double().mean().item(),
        wasteful=(early & last).double().mean().item(),
        oracle_accuracy=(early | last).double().mean().item(),
        oracle_cost=values[first].mean().item(),
    )


def accuracy_at(curve: Sequence[CurvePoint], fractions: Sequence[float], backbone: float) -> list[float | None]:
    """Return the best accuracy on a curve at a mean cost of at most each fraction of the backbone's.

    Args:
        curve: For instance of :func:`~cleave.planning.exit_calibration.cost_curve`.
        fractions: For instance 0.25, 0.5, 0.75 and 1.
        backbone: Cost of the backbone without exits, in the unit of the curve.

    Returns:
        One a fraction; ``None`` where no point is as cheap.

    Raises:
        ValueError: The curve is empty, or a fraction or the backbone's cost is not positive.

    Example:
        >>> curve = [CurvePoint((0.1,), 0.8, 1.0, (1.0, 0.0)), CurvePoint((None,), 0.9, 4.0, (0.0, 1.0))]
        >>> accuracy_at(curve, [0.2, 0.5, 1.0], backbone=4.0)
        [None, 0.8, 0.9]
    """
    if not curve:
        raise ValueError("curve holds no points")
    if not backbone > 0 or not all(fraction > 0 for fraction in fractions):
        raise ValueError(f"backbone and fractions must be above 0, got {backbone} and {list(fractions)}")
    reached = [[p.accuracy for p in curve if p.cost <= fraction * backbone] for fraction in fractions]
    return [max(found, default=None) for found in reached]


@dataclass(frozen=True)
class Excess:
    """How far the mean cost of other samples may lie from that of the samples that thresholds were chosen on.

    Attributes:
        error: Standard error of the mean over the other samples less the mean over these, in the unit of the costs.
        expected: How far above the budget the other mean lies in expectation, counting 0 where it keeps to it.
    """

    error: float
    expected: float


def expected_excess(
    shares: Sequence[float], costs: Sequence[float], budget: float, calibrated: int, tested: int
) -> Excess:
    r"""Return by how much a budget that was kept in calibration is overspent on other samples, by chance alone.

    The cost of a sample has the variance :math:`\sigma^2` of the costs under the shares. The mean over n' other samples
    less that over the n samples of calibration has about a normal distribution with

    .. math::
        s^2 = \sigma^2 \Big( \frac1n + \frac1{n'} \Big), \qquad
        \mathrm{E} \max(0, \bar c' - B) = s \, \big( \varphi(z) - z \, (1 - \Phi(z)) \big), \qquad
        z = \frac{B - \bar c}{s}.

    Where the budget B is used up, z = 0, that is 0.4 s. Thresholds that were chosen to use it up lie a little nearer to
    it than chance would put them, which this leaves out.

    Args:
        shares: Share of the samples of calibration that left at each exit.
        costs: Cumulative cost of leaving at each exit.
        budget: Mean cost allowed, in the unit of the costs.
        calibrated: Samples n that thresholds were chosen on.
        tested: Other samples n'.

    Raises:
        ValueError: There is not a cost for each share, or no sample.

    Example:
        >>> found = expected_excess([0.5, 0.5], [1.0, 3.0], budget=2.0, calibrated=200, tested=200)
        >>> round(found.error, 4), round(found.expected, 4)
        (0.1, 0.0399)
    """
    if len(shares) != len(costs) or min(calibrated, tested) < 1:
        raise ValueError(
            f"give a cost for each share and at least one sample, got {len(shares)} shares, {len(costs)} costs, "
            f"calibrated={calibrated} and tested={tested}"
        )
    mean = sum(share * cost for share, cost in zip(shares, costs, strict=True))
    variance = sum(share * (cost - mean) ** 2 for share, cost in zip(shares, costs, strict=True))
    error = math.sqrt(variance * (1 / calibrated + 1 / tested))
    if not error:
        return Excess(0.0, max(0.0, mean - budget))
    z = (budget - mean) / error
    beyond = math.erfc(z / math.sqrt(2)) / 2
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return Excess(error, error * (density - z * beyond))
