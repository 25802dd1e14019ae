"""What planning reads: the logits of every exit, labels and costs, checked, and what a policy makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cleave.deployment import ExitPolicy
from cleave.deployment.exits.policy import checked_costs

Floats = npt.NDArray[np.float64]


class Decisions(NamedTuple):
    """What each exit would answer and decide if no sample had left before.

    Attributes:
        answers: Logits that would be returned (E, B, C).
        leaves: Whether the policy would stop there (E, B); all at the last exit.
    """

    answers: Tensor
    leaves: Tensor


@torch.no_grad()
def decisions(policy: ExitPolicy, logits: Tensor) -> Decisions:
    """Run a policy over stored logits (E, B, C) as if every sample went all the way.

    Raises:
        ValueError: The logits are not (E, B, C), not finite, or of another number of exits than the policy's.
    """
    check_logits(logits)
    exits, batch, classes = logits.shape
    if exits != policy.exits:
        raise ValueError(f"logits hold {exits} exits, the policy is for {policy.exits}; pass those of its own network")
    state = policy.start(batch, classes, logits[0])
    answers, leaves = [], []
    for i, own in enumerate(logits):
        answer, leave, state = policy.decide(i, own, state)
        answers.append(answer)
        leaves.append(leave)
    return Decisions(torch.stack(answers), torch.stack(leaves))


def check_logits(logits: Tensor, labels: Tensor | None = None) -> None:
    """Check the logits (E, B, C) of every exit and, where given, the labels (B,).

    Raises:
        ValueError: A shape, dtype or value is not what it must be.
    """
    if logits.ndim != 3 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits must be floats (E, B, C): exits, samples, classes; got {list(logits.shape)} of {logits.dtype}"
        )
    broken = [i for i, own in enumerate(logits) if not own.isfinite().all()]
    if broken:
        raise ValueError(f"logits of exit {broken[0]} hold NaN or infinity: the network has diverged there")
    if labels is None:
        return
    batch, classes = logits.shape[1:]
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 ({batch},), one a sample; got {list(labels.shape)} of {labels.dtype}")
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels must be in 0 to {classes - 1}, the classes of the logits; got {found}")


def check_costs(costs: Sequence[float] | Tensor, exits: int) -> Floats:
    """Return the cumulative costs of leaving at each exit as float64.

    Raises:
        ValueError: There is not one for each exit, or they are not positive, finite and rising.
    """
    return np.array(checked_costs([float(cost) for cost in costs], exits))
