"""Cross-entropy training of a network with a bottleneck."""

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


class CrossEntropy(Task):
    """Cross entropy with the labels, end to end (eq. 2 of Matsubara, Levorato and Restuccia 2022).

    Every part is trained; ``train=[bottleneck]`` keeps the backbone frozen, as BottleNet's first stage does
    (Eshratifar et al. 2019). Needs no teacher.

    Args:
        network: The network to train.
        loss: Compares logits (B, classes) with labels (B,).
        train: Parts that learn; ``None``: backbone and bottlenecks.
        extra_terms: More terms by name.
        others: Frozen networks by name.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.
    """

    trains = ("backbone", "bottleneck")

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
        terms = {"cross_entropy": Term(loss, of=["student/logits", "labels"])}
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
