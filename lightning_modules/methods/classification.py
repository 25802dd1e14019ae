"""Classification by cross entropy: how teachers and baselines are trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from cleave.lightning_modules.base import Batch, Task


class Classification(Task):
    """Cross entropy on logits, with label smoothing (Szegedy et al. 2016).

    Args:
        *args: As of :class:`~cleave.lightning_modules.base.Task`.
        label_smoothing: Share of each label's weight spread over all classes, in [0, 1).
        **kwargs: As of :class:`~cleave.lightning_modules.base.Task`.

    Raises:
        ValueError: ``label_smoothing`` lies outside [0, 1).
    """

    def __init__(self, *args: Any, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross entropy of the batch."""
        images, labels = batch
        return {"ce": F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)}
