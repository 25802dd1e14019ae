"""Exits that learn from a better informed output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import Term
from cleave.losses import ExitDistillationLoss


class ExitsDistilled(Task):
    """Labels and the softened outputs of the final exit, of the next one, or of a teacher, for every exit.

    From the final exit: Phuong and Lampert 2019, "Distillation-Based Training for Multi-Exit Architectures", and
    Li et al. 2019. End to end, or with ``train=[exits]`` on a frozen backbone.

    Args:
        network: The network to train, with exits.
        loss: Says whom the exits learn from, and how much.
        train: Parts that learn; ``None``: backbone, bottlenecks and exits.
        extra_terms: More terms by name.
        others: Frozen networks by name; needs ``teacher`` where ``loss.source`` is that.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.

    Raises:
        ValueError: The teacher's logits are of other classes, or the weights do not fit the exits or leave nothing of
            ``train`` to learn.
    """

    trains = ("backbone", "bottleneck", "exits")

    def __init__(
        self,
        network: StagedNetwork,
        *,
        loss: ExitDistillationLoss,
        train: Sequence[str] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        others: Mapping[str, Frozen] | None = None,
        evaluators: Sequence[Evaluator] | None = None,
        training: Training = DEFAULT,
        feature_cache: Mapping[str, Any] | None = None,
    ) -> None:
        of = ["student/exits", "labels", "progress", *(["teacher/logits"] if loss.needs_teacher else [])]
        terms = {"exit": Term(loss, of=of)}
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
