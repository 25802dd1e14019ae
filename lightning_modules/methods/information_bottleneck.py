"""The variational information bottleneck."""

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
from cleave.lightning_modules.term import Term


class InformationBottleneck(Task):
    """Cross entropy plus β times the rate of a stochastic representation (Alemi et al. 2017, eq. 17).

    The rate is the divergence of the encoder's Gaussian from a prior, in nats a sample; of several bottlenecks each has
    one. In evaluation the mean is quantised and sent. Every part is trained.

    Args:
        network: The network to train, with stochastic encoders (``bottleneck.variance``).
        loss: Compares logits (B, classes) with labels (B,).
        rate: Divergence of (mean, log_variance) from the prior.
        beta: Weight of the rate.
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
        rate: nn.Module,
        beta: float,
        train: Sequence[str] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        others: Mapping[str, Frozen] | None = None,
        evaluators: Sequence[Evaluator] | None = None,
        training: Training = DEFAULT,
        feature_cache: Mapping[str, Any] | None = None,
    ) -> None:
        terms = {"cross_entropy": Term(loss, of=["student/logits", "labels"])}
        for name, cut in by_bottleneck(network, "InformationBottleneck", "rate").items():
            terms[name] = Term(rate, of=[f"student/{cut}/mean", f"student/{cut}/log_variance"], weight=beta)
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
