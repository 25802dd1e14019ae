"""Head-network distillation."""

from __future__ import annotations

from typing import Any

from torch import nn

from cleave.architectures.split import SplitNetwork
from cleave.lightning_modules.split import SplitTask
from cleave.lightning_modules.terms import FeatureTerm


class HeadDistillation(SplitTask):
    """Head-network distillation: the student's head learns to mimic the teacher's (Matsubara et al. 2019, eq. 6).

    Encoder, quantiser and decoder alone are trained; the student's tail is the teacher's and stays frozen. In training
    neither tail runs.

    Args:
        network: The split network to train.
        *args: As of :class:`~cleave.lightning_modules.split.SplitTask`.
        objective: Compares the features (B, ...) of student and teacher at the split.
        **kwargs: As of :class:`~cleave.lightning_modules.split.SplitTask`.
    """

    def __init__(self, network: SplitNetwork, *args: Any, objective: nn.Module, **kwargs: Any) -> None:
        terms = {"head": FeatureTerm(objective, at=network.split)}
        super().__init__(network, *args, terms=terms, **kwargs)
