"""The checkpoint that an interrupted run goes on from."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from cleave.lightning_modules.privates import save_as_best, validates_now


class LastCheckpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` where a run resumes exactly: at each epoch's end and, if asked, every few steps within.

    Lightning's own callback knows one of the two at a time, and by steps it would also save on an epoch's last step.
    There the epoch's validation and scheduler step are still to come; a run resumed from there leaves them out. Where a
    validation follows within an epoch, it saves behind that.

    Args:
        dirpath: Folder of the file.
        every_n_train_steps: Optimizer steps between two saves within an epoch; ``None`` for none.

    Raises:
        ValueError: ``every_n_train_steps`` is no positive integer.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None and (not isinstance(every_n_train_steps, int) or every_n_train_steps < 1):
            raise ValueError(f"every_n_train_steps must be a positive integer or null, got {every_n_train_steps!r}")
        super().__init__(dirpath, "last", every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False)
        self.steps = every_n_train_steps
        self._due = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start anew: the file of an earlier run, here or in another folder, is not this run's to follow up."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save within an epoch."""
        self._due = self._due or (self.steps is not None and trainer.global_step % self.steps == 0)
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not validates_now(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save behind a validation within an epoch."""
        if not trainer.sanity_checking and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at an epoch's end."""
        self._due = False
        super().on_train_epoch_end(trainer, pl_module)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if self._due:
            save_as_best(self, trainer)
        self._due = False
