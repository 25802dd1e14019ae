"""Head-network distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import Batch
from lightning_modules.split import SplitTask


class HeadDistillation(SplitTask):
    """Head-network distillation: the student's head learns to mimic the teacher's (Matsubara et al. 2019, eq. 6).

    Encoder, quantiser and decoder alone are trained; the student's tail is the teacher's and stays frozen. In training
    neither tail runs. Without a teacher the task evaluates only.

    Args:
        *args: As of :class:`~lightning_modules.split.SplitTask`.
        objective: Compares the features (B, ...) of student and teacher at the split.
        **kwargs: As of :class:`~lightning_modules.split.SplitTask`.
    """

    def __init__(self, *args: Any, objective: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective

    def frozen_modules(self) -> list[nn.Module]:
        """The tail, and in the form ``insert`` the head before the bottleneck."""
        return [m for m in (self.network.head, self.network.tail) if m is not None]

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the distance between the two heads' features."""
        images, _ = batch
        student = self.network.features(images, at=[self.split])
        with torch.no_grad():
            teacher = self.teacher.features(images, at=[self.split])
        return {"head": self.objective(student[self.split], teacher[self.split])}
