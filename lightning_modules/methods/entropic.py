"""The entropic student: distillation under a learned prior's rate."""

from __future__ import annotations

from typing import Any

from cleave.architectures.split import SplitNetwork
from cleave.lightning_modules.split import SplitTask
from cleave.lightning_modules.terms import FeaturesTerm, RateTerm
from cleave.losses import GeneralizedHeadDistillationLoss, RateLoss


class Entropic(SplitTask):
    """Distillation of features plus β times the rate in bits per image pixel.

    The first stage of the entropic student (Matsubara et al. 2022, "Supervised Compression for Resource-Constrained
    Edge Computing Systems").

    The rate is that of the representation under its learned factorised prior, which the entropy coder's tables are made
    of. Encoder, prior and decoder are trained. The paper's second stage, with encoder and prior frozen, is
    ``knowledge_distillation`` with ``train=[decoder,tail]``; ``experiment=entropic_student`` runs both.

    Args:
        network: The split network to train, with a learned prior (``codec=entropy``).
        *args: As of :class:`~cleave.lightning_modules.split.SplitTask`.
        objective: Compares features at named layers with a weight each.
        beta: Weight of the rate.
        **kwargs: As of :class:`~cleave.lightning_modules.split.SplitTask`.
    """

    def __init__(
        self,
        network: SplitNetwork,
        *args: Any,
        objective: GeneralizedHeadDistillationLoss,
        beta: float,
        **kwargs: Any,
    ) -> None:
        rate = RateLoss(pixels=network.image_shape[1] * network.image_shape[2])
        terms = {"head": FeaturesTerm(objective), "rate": RateTerm(rate, beta)}
        super().__init__(network, *args, terms=terms, **kwargs)
