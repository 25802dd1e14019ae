"""Cross-entropy training of a split network."""

from __future__ import annotations

from typing import Any

from torch import nn

from cleave.architectures.split import PARTS, SplitNetwork
from cleave.lightning_modules.split import SplitTask
from cleave.lightning_modules.terms import LabelTerm


class CrossEntropy(SplitTask):
    """Cross entropy with the labels, end to end (eq. 2 of Matsubara, Levorato and Restuccia 2022).

    Every part is trained; ``train=[bottleneck]`` keeps head and tail frozen, as BottleNet's first stage does
    (Eshratifar et al. 2019). Needs no teacher.

    Args:
        network: The split network to train.
        *args: As of :class:`~cleave.lightning_modules.split.SplitTask`.
        objective: Compares logits (B, classes) with labels (B,).
        **kwargs: As of :class:`~cleave.lightning_modules.split.SplitTask`.
    """

    trains = PARTS

    def __init__(self, network: SplitNetwork, *args: Any, objective: nn.Module, **kwargs: Any) -> None:
        super().__init__(network, *args, terms={"cross_entropy": LabelTerm(objective)}, **kwargs)
