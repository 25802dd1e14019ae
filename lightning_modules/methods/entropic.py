"""The entropic student: distillation under a learned prior's rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.methods.naming import by_bottleneck, compared_layers
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import STUDENT, TEACHER, Term
from cleave.losses import GeneralizedHeadDistillationLoss, RateLoss


class Entropic(Task):
    """Distillation of features plus β times the rate in bits per image pixel.

    The first stage of the entropic student (Matsubara et al. 2022, "Supervised Compression for Resource-Constrained
    Edge Computing Systems").

    The rate is that of the representation under its learned factorised prior, which the entropy coder's tables are made
    of; of several bottlenecks each has one. Encoder, prior and decoder are trained. The paper's second stage, with
    encoder and prior frozen, is ``knowledge_distillation`` with ``train=[decoder,tail]``;
    ``experiment=entropic_student`` runs both.

    Args:
        network: The network to train, with learned priors (``codec=entropy``).
        loss: Compares features at named layers with a weight each.
        beta: Weight of the rate.
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
        loss: GeneralizedHeadDistillationLoss,
        beta: float,
        train: Sequence[str] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        others: Mapping[str, Frozen] | None = None,
        evaluators: Sequence[Evaluator] | None = None,
        training: Training = DEFAULT,
        feature_cache: Mapping[str, Any] | None = None,
    ) -> None:
        layers = list(loss.weights)
        terms = {"head": Term(loss, of=[[f"{owner}/{layer}" for layer in layers] for owner in (STUDENT, TEACHER)])}
        for name, cut in by_bottleneck(network, "Entropic", "rate").items():
            rate = RateLoss(pixels=network.input_shape[1] * network.input_shape[2])
            terms[name] = Term(rate, of=[f"student/{cut}/likelihoods"], weight=beta)
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
        """Return the layers that the loss compares, and those of further terms."""
        compared = compared_layers(settings.get("loss")) if owner in (STUDENT, TEACHER) else []
        return list(dict.fromkeys([*compared, *super().layers(split, settings, owner)]))
