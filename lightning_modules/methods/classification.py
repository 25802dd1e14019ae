"""Classification by cross entropy: how teachers and baselines are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import Term


class Classification(Task):
    """Cross entropy on logits, with label smoothing (Szegedy et al. 2016).

    Args:
        network: The network to train.
        label_smoothing: Share of each label's weight spread over all classes, in [0, 1).
        train: Parts that learn; ``None``: backbone and bottlenecks.
        extra_terms: More terms by name.
        others: Frozen networks by name.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.

    Raises:
        ValueError: ``label_smoothing`` lies outside [0, 1).
    """

    trains = ("backbone", "bottleneck")

    def __init__(
        self,
        network: StagedNetwork,
        *,
        label_smoothing: float = 0.0,
        train: Sequence[str] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        others: Mapping[str, Frozen] | None = None,
        evaluators: Sequence[Evaluator] | None = None,
        training: Training = DEFAULT,
        feature_cache: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        terms = {"ce": Term(loss, of=["student/logits", "labels"])}
        super().__init__(
            network,
            terms,
            training=training,
            evaluators=evaluators,
            others=others,
            train=train,
            feature_cache=feature_cache,
            extra_terms=extra_terms,
        )
