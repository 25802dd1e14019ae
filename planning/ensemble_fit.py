"""An ensemble of the exits, fitted on stored logits, and where it is worse than the exits themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cleave.deployment import EnsemblePolicy
from cleave.losses import fit_geometric_ensemble
from cleave.planning.exit_statistics import exit_accuracy
from cleave.planning.stored_logits import check_logits, decisions
from cleave.planning.temperature import check_split


def fit_ensemble(policy: EnsemblePolicy, logits: Tensor, labels: Tensor, *, split: str = "val") -> EnsemblePolicy:
    """Return an ensemble policy with the weights that answer most likely; all else of it stays.

    Args:
        policy: The policy; its temperatures divide the logits first.
        logits: Every exit's own logits (E, B, C).
        labels: int64 (B,).
        split: Where they are from; ``test`` is refused.

    Raises:
        ValueError: A shape or value is not what it must be, or the split is the test split.
    """
    check_split(split)
    check_logits(logits, labels)
    policy.check(logits)
    scaled = logits.double()
    if policy.temperatures is not None:
        scaled = scaled / scaled.new_tensor(policy.temperatures).view(-1, 1, 1)
    weights, log_bias = fit_geometric_ensemble(list(scaled), labels)
    return policy.with_ensemble(weights.tolist(), log_bias.tolist())


@torch.no_grad()
def worse_than_exits(policy: EnsemblePolicy, logits: Tensor, labels: Tensor) -> Sequence[tuple[int, float, float]]:
    """Return the exits whose ensemble answers fewer samples rightly than the exit alone.

    Args:
        policy: The ensemble; its thresholds do not matter.
        logits: Every exit's own logits (E, B, C).
        labels: int64 (B,).

    Returns:
        The exit, the ensemble's accuracy, and the exit's own.

    Raises:
        ValueError: A shape or value is not what it must be.

    Example:
        >>> from cleave.deployment import build_policy
        >>> logits = torch.tensor([[[9.0, 0.0]], [[0.0, 1.0]]])  # the first exit is sure, and wrong
        >>> worse_than_exits(build_policy("ensemble", exits=2), logits, torch.tensor([1]))
        [(1, 0.0, 1.0)]
    """
    own = exit_accuracy(logits, labels)
    together = exit_accuracy(decisions(policy, logits).answers, labels)
    return [(i, both, alone) for i, (both, alone) in enumerate(zip(together, own, strict=True)) if both < alone]
