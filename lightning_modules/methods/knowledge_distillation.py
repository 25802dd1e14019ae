"""Knowledge distillation of a split network."""

from __future__ import annotations

from typing import Any

from torch import nn

from cleave.architectures.split import PARTS, SplitNetwork
from cleave.lightning_modules.split import SplitTask
from cleave.lightning_modules.terms import LogitsTerm


class KnowledgeDistillation(SplitTask):
    """Labels and the teacher's softened outputs, end to end (Hinton et al. 2014; eq. 3-4 of Matsubara et al. 2022).

    Every part is trained.

    Args:
        network: The split network to train.
        *args: As of :class:`~cleave.lightning_modules.split.SplitTask`.
        objective: Compares the logits (B, classes) of student and teacher, and the labels (B,).
        **kwargs: As of :class:`~cleave.lightning_modules.split.SplitTask`.
    """

    trains = PARTS

    def __init__(self, network: SplitNetwork, *args: Any, objective: nn.Module, **kwargs: Any) -> None:
        super().__init__(network, *args, terms={"distillation": LogitsTerm(objective)}, **kwargs)
