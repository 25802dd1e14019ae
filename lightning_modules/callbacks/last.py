"""The checkpoint that an interrupted run goes on from."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from cleave.lightning_modules import signals
from cleave.lightning_modules.privates import accumulating, save_as_best, validates_now


class LastCheckpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` where a run resumes exactly: at each epoch's end and, if asked, every few steps within.

    Lightning's own callback knows one of the two at a time, and by steps it would also save on an epoch's last step.
    There the epoch's validation and scheduler step are still to come; a run resumed from there leaves them out. Where a
    validation follows within an epoch, it saves behind that.

    In a command of Cleave's it also saves at the next such place when SIGTERM or Ctrl-C comes, and ends the run there.

    Args:
        dirpath: Folder of the file.
        every_n_train_steps: Optimizer steps between two saves within an epoch; ``None`` for none.

    Raises:
        ValueError: ``every_n_train_steps`` is no positive integer.
        Stopped: A signal asked the run to end, once it is saved.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None and (not isinstance(every_n_train_steps, int) or every_n_train_steps < 1):
            raise ValueError(f"every_n_train_steps must be a positive integer or null, got {every_n_train_steps!r}")
        super().__init__(dirpath, "last", every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False)
        self.steps = every_n_train_steps
        self._due = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start anew: the file of an earlier run, here or in another folder, is not this run's to follow up."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Defer signals to where the run can be saved; Lightning has just put its own handler before."""
        super().on_train_start(trainer, pl_module)
        signals.take_back()
        signals.defer(_tell)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save within an epoch."""
        asked = _asked(trainer)
        self._due = self._due or asked or (self.steps is not None and trainer.global_step % self.steps == 0)
        waits = trainer.world_size > 1 and accumulating(trainer)  # each process has gradients of its own
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or validates_now(trainer) or waits:
            return
        self._save_if_due(trainer)
        self._stop(trainer, asked)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save behind a validation within an epoch."""
        if trainer.sanity_checking or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        asked = _asked(trainer)
        self._due = self._due or asked
        self._save_if_due(trainer)
        self._stop(trainer, asked)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at an epoch's end."""
        self._due = False
        super().on_train_epoch_end(trainer, pl_module)
        self._stop(trainer, _asked(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a signal end what follows at once."""
        super().on_train_end(trainer, pl_module)
        signals.defer(None)
        self._stop(trainer, signals.received() is not None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let a signal end what follows at once."""
        super().on_exception(trainer, pl_module, exception)
        signals.defer(None)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if self._due:
            save_as_best(self, trainer)
        self._due = False

    def _stop(self, trainer: pl.Trainer, asked: bool) -> None:
        if asked:
            signals.defer(None)
            stopped = signals.Stopped(signals.received() or signal.SIGTERM, speaks=trainer.is_global_zero)
            file = Path(str(self.dirpath), "last.ckpt")
            stopped.checkpoint = None if getattr(trainer, "fast_dev_run", False) else str(file)
            raise stopped


def _asked(trainer: pl.Trainer) -> bool:
    """Return whether a signal reached any process of the run."""
    if not signals.installed():
        return False
    asked = signals.received() is not None
    return asked if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(asked, all=False)


@rank_zero_only
def _tell(signum: int) -> None:
    name = signals.name_of(signum)
    print(f"{name}: the run is saved behind this step, then it ends; a second {name} ends it at once", file=sys.stderr)
