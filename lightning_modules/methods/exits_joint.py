"""Joint training of a backbone and its exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import Term


class ExitsJoint(Task):
    """The weighted sum of every exit's cross entropy, end to end (eq. 8 of Matsubara et al. 2022).

    Args:
        network: The network to train, with exits.
        loss: Weighs the exits; it may follow the progress of the training.
        train: Parts that learn; ``None``: backbone, bottlenecks and exits.
        extra_terms: More terms by name.
        others: Frozen networks by name.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.

    Raises:
        ValueError: The weights do not fit the exits, or leave nothing of ``train`` to learn.
    """

    trains: ClassVar[tuple[str, ...]] = ("backbone", "bottleneck", "exits")

    def __init__(
        self,
        network: StagedNetwork,
        *,
        loss: nn.Module,
        train: Sequence[str] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        others: Mapping[str, Frozen] | None = None,
        evaluators: Sequence[Evaluator] | None = None,
        training: Training = DEFAULT,
        feature_cache: Mapping[str, Any] | None = None,
    ) -> None:
        terms = {"exit": Term(loss, of=["student/exits", "labels", "progress"])}
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
