"""Early stopping that a resumed run remembers."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning import callbacks


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's ``EarlyStopping``; a fit that it had stopped trains no further when it is resumed.

    A recipe resumed from ``last.ckpt`` of such a stage then goes on to the next one, as the uninterrupted run did.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop again."""
        trainer.should_stop = trainer.should_stop or self.stopped_epoch > 0
