"""Head-network distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.methods.naming import by_bottleneck
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import STUDENT, TEACHER, Term


class HeadDistillation(Task):
    """Head-network distillation: the student's head learns to mimic the teacher's (Matsubara et al. 2019, eq. 6).

    Encoder, quantiser and decoder alone are trained; the student's tail is the teacher's and stays frozen. In training
    neither tail runs. With several bottlenecks the features are compared at each of them.

    Args:
        network: The network to train.
        loss: Compares the features (B, ...) of student and teacher at the split.
        train: Parts that learn; ``None``: the bottlenecks.
        extra_terms: More terms by name.
        others: Frozen networks by name; needs ``teacher``.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.
    """

    trains = ("bottleneck",)

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
        cuts = by_bottleneck(network, "HeadDistillation", "head")
        terms = {name: Term(loss, of=[f"student/{cut}", f"teacher/{cut}"]) for name, cut in cuts.items()}
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

    @classmethod
    def layers(cls, split: Sequence[str], settings: Mapping[str, Any], owner: str = STUDENT) -> list[str]:
        """Return the layers of the bottlenecks, and those of further terms."""
        compared = split if owner in (STUDENT, TEACHER) else []
        return list(dict.fromkeys([*compared, *super().layers(split, settings, owner)]))
