"""The variational information bottleneck."""

from __future__ import annotations

from typing import Any

from torch import nn

from cleave.architectures.split import PARTS, SplitNetwork
from cleave.lightning_modules.split import SplitTask
from cleave.lightning_modules.terms import GaussianTerm, LabelTerm


class InformationBottleneck(SplitTask):
    """Cross entropy plus β times the rate of a stochastic representation (Alemi et al. 2017, eq. 17).

    The rate is the divergence of the encoder's Gaussian from a prior, in nats a sample. In evaluation the mean is
    quantised and sent. Every part is trained.

    Args:
        network: The split network to train, with a stochastic encoder (``bottleneck.variance``).
        *args: As of :class:`~cleave.lightning_modules.split.SplitTask`.
        objective: Compares logits (B, classes) with labels (B,).
        rate: Divergence of (mean, log_variance) from the prior.
        beta: Weight of the rate.
        **kwargs: As of :class:`~cleave.lightning_modules.split.SplitTask`.
    """

    trains = PARTS

    def __init__(
        self, network: SplitNetwork, *args: Any, objective: nn.Module, rate: nn.Module, beta: float, **kwargs: Any
    ) -> None:
        terms = {"cross_entropy": LabelTerm(objective), "rate": GaussianTerm(rate, beta)}
        super().__init__(network, *args, terms=terms, **kwargs)
