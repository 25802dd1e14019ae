"""Reaches into what Lightning keeps to itself; each is held by a test, as a new version may move it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor


def restore_loaders(trainer: pl.Trainer) -> None:
    """Give the loaders the state of an interrupted run, of which Lightning 2.6 forgets those that it has made before.

    Asking for the number of steps of a run, as schedulers do, makes them.
    """
    trainer.fit_loop._load_combined_loader_states()


def restore_metrics(trainer: pl.Trainer, metrics: Mapping[str, Tensor]) -> None:
    """Let a resumed run know what was measured last, as an uninterrupted one would."""
    trainer.callback_metrics.update(metrics)


def accumulating(trainer: pl.Trainer) -> bool:
    """Return whether the last batch gave gradients that no optimizer step has used yet."""
    return trainer.fit_loop._should_accumulate()


def validates_now(trainer: pl.Trainer) -> bool:
    """Return whether a validation follows the training batch that has just ended."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def logged_steps(trainer: pl.Trainer) -> int:
    """Return the steps that the loggers have seen."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_steps(trainer: pl.Trainer, steps: int) -> None:
    """Let the loggers' steps go on from where another fit ended; each trainer would begin at 0."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def kill_of_spawned(trainer: pl.Trainer) -> Callable[[int], None] | None:
    """Return what sends a signal to the processes that a trainer spawns, ``None`` where it spawns none."""
    launcher = trainer.strategy.launcher
    return launcher.kill if isinstance(launcher, _MultiProcessingLauncher) else None


def misses_unused(trainer: pl.Trainer) -> bool:
    """Return whether several processes would wait for gradients of parameters that a step does not use."""
    settings: dict[str, Any] | None = getattr(trainer.strategy, "_ddp_kwargs", None)
    return settings is not None and trainer.world_size > 1 and not settings.get("find_unused_parameters", False)


def save_as_best(callback: Any, trainer: pl.Trainer) -> None:
    """Let a ``ModelCheckpoint`` save now, unless it would not at this point of the run."""
    if not callback._should_skip_saving_checkpoint(trainer):
        callback._save_topk_checkpoint(trainer, callback._monitor_candidates(trainer))
