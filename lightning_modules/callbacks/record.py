"""How far a fit came and how well."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer

from cleave.lightning_modules.privates import logged_steps


class FitRecord(Timer):
    """Epochs, steps, seconds and score of a fit, also of one that ran in processes of its own.

    From those Lightning brings back little more than the weights, so the figures lie in memory that all share.

    Args:
        max_time: After what time training ends, as of Lightning's ``Timer``. A trainer ignores its own ``max_time``
            where such a timer stands among its callbacks.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None) -> None:
        super().__init__(max_time)
        self._values = torch.full((4,), math.nan, dtype=torch.float64).share_memory_()

    @property
    def epochs(self) -> int:
        """Epochs trained, those before a resume included."""
        return int(self._values[0])

    @property
    def steps(self) -> int:
        """Steps that the loggers have seen, those of the recipe's steps before included."""
        return int(self._values[1])

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training, validation included, those before a resume too."""
        return float(self._values[2])

    @property
    def score(self) -> float | None:
        """The monitored metric, of the best checkpoint or, where none is kept, after the last epoch."""
        value = float(self._values[3])
        return None if math.isnan(value) else value

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figures down."""
        checkpoint: Any = trainer.checkpoint_callback
        loop: Any = trainer.fit_loop
        score: Any = getattr(checkpoint, "best_model_score", None)
        if score is None:
            score = trainer.callback_metrics.get(getattr(pl_module, "monitor", "val/acc"), math.nan)
        # Not `current_epoch`, which lags behind in a fit that was resumed after its early stop.
        epochs, steps = loop.epoch_progress.current.processed, logged_steps(trainer)
        figures = (epochs, steps, self.time_elapsed(), float(score))
        self._values.copy_(torch.tensor(figures, dtype=torch.float64))
