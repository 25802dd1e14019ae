"""Generalised head-network distillation."""

from __future__ import annotations

from typing import Any

from cleave.architectures.split import SplitNetwork
from cleave.lightning_modules.split import SplitTask
from cleave.lightning_modules.terms import FeaturesTerm
from cleave.losses import GeneralizedHeadDistillationLoss


class GeneralizedHeadDistillation(SplitTask):
    """Head-network distillation at several layers, through the frozen tail (Matsubara et al. 2020, eq. 7).

    Encoder, quantiser and decoder alone are trained. Student and teacher run as far as the last layer compared.

    Args:
        network: The split network to train; it observes every layer that the objective names.
        *args: As of :class:`~cleave.lightning_modules.split.SplitTask`.
        objective: Compares features at named layers with a weight each.
        **kwargs: As of :class:`~cleave.lightning_modules.split.SplitTask`.
    """

    def __init__(
        self, network: SplitNetwork, *args: Any, objective: GeneralizedHeadDistillationLoss, **kwargs: Any
    ) -> None:
        super().__init__(network, *args, terms={"head": FeaturesTerm(objective)}, **kwargs)
