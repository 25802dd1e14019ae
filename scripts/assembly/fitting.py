"""Fit the stages of a run one after another, each from the best weights of the one before it."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, NamedTuple

import pytorch_lightning as pl
from hydra.utils import instantiate
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.utilities import rank_zero_only

from cleave.lightning_modules import Task
from cleave.lightning_modules.callbacks import CheckpointMetadata, FitRecord, StageMarker, WandbTracking
from cleave.reports.terminal import console, number
from cleave.scripts.assembly.building import Assembly, build_task, instantiate_each, plain
from cleave.scripts.assembly.recipe import Stage
from cleave.scripts.assembly.restoring import load_strictly, network_state, read_checkpoint


class Fit(NamedTuple):
    """A stage with what fits it, built before any stage is trained."""

    stage: Stage
    task: Task
    trainer: pl.Trainer
    metadata: CheckpointMetadata
    record: FitRecord


class Fitted(NamedTuple):
    """What a stage came to; the checkpoints of the stages behind it carry it.

    Attributes:
        name: The stage's name, ``None`` where the run is no recipe.
        method: Its method in words.
        epochs: Epochs trained, those before a resume included; ``None`` where it was only tested.
        steps: Steps that the loggers have seen, those of the stages before included.
        seconds: Wall-clock seconds of training, validation included; ``None`` where it was only tested.
        monitor: The metric by which its best checkpoint was chosen.
        score: What that metric was.
        best: The best checkpoint, ``None`` where none was saved.
    """

    name: str | None
    method: str
    epochs: int | None
    steps: int
    seconds: float | None
    monitor: str
    score: float | None
    best: str | None


def prepare(stage: Stage, parts: Assembly, loggers: list[Any]) -> Fit:
    """Build a stage's task, callbacks and trainer, so that what cannot be built is told before any stage is trained."""
    cfg = stage.config
    with stage.told():
        task = build_task(cfg, parts.network, parts.data.class_names, **parts.teaching)
        rehearse(task)
        callbacks = instantiate_each(cfg.get("callbacks"))
        if not loggers:  # Lightning refuses to watch the rate where nothing writes it down
            callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
        metadata, record = CheckpointMetadata(plain(cfg), parts.data.class_names, parts.data.input), FitRecord()
        callbacks += [record, metadata, WandbTracking(stage=stage.name)]
        if stage.name:
            callbacks.append(StageMarker(stage.number))
        trainer: pl.Trainer = instantiate(cfg.trainer, _partial_=True)(callbacks=callbacks, logger=loggers)
    return Fit(stage, task, trainer, metadata, record)


def rehearse(task: Task) -> None:
    """Build the optimizer, and hold the scheduler's arguments against its signature.

    Raises:
        TypeError: One of them takes no such argument.
        ValueError: Nothing is trainable, or an argument is out of range.
    """
    task.freeze_parts()  # the last task built has left its own parts frozen
    task.optimizer_factory(task.parameter_groups())
    if isinstance(factory := task.scheduler_factory, functools.partial):
        try:
            inspect.signature(factory.func).bind(None, *factory.args, **factory.keywords)
        except TypeError as error:
            raise TypeError(f"method.scheduler: {factory.func.__name__}: {error}") from error


def fit(this: Fit, parts: Assembly, done: list[Fitted]) -> Fitted:
    """Fit one stage; ``done`` are those before it."""
    stage, task, trainer, metadata, record = this
    progress = trainer.fit_loop.epoch_loop
    metadata.before = [fitted._asdict() for fitted in done]
    before = done[-1] if done and not stage.ckpt_path else None
    if before:
        # The loggers' steps go on where the stage before ended; each trainer would begin at 0.
        progress._batches_that_stepped = before.steps
        if before.best:
            load_strictly(parts.network, network_state(read_checkpoint(before.best)), f"the checkpoint {before.best}")
    if stage.ckpt_path:  # a run may be resumed in the folder that it left
        warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
    if stage.name:
        announce(this, before)
    trainer.fit(task, datamodule=parts.data, ckpt_path=stage.ckpt_path, weights_only=True)
    progress._batches_that_stepped = record.steps  # of this process, where ranks of their own fitted
    fitted = tested(this)._replace(epochs=record.epochs, steps=record.steps, seconds=record.seconds, score=record.score)
    log_stage(fitted, trainer)
    return fitted


def tested(this: Fit) -> Fitted:
    """What is known of a stage that is not fitted."""
    checkpoint: Any = this.trainer.checkpoint_callback
    monitor = getattr(checkpoint, "monitor", None) or "val/acc"
    best = getattr(checkpoint, "best_model_path", "") or None
    return Fitted(this.stage.name, this.stage.method, None, 0, None, monitor, None, best)


@rank_zero_only
def announce(this: Fit, before: Fitted | None) -> None:
    """Say which stage begins, what it trains and where it starts from."""
    stage, task = this.stage, this.task
    console.rule(f"stage {stage.number} of {len(stage.config.stages)}: {stage.name}")
    words = [stage.method + (f" of {', '.join(parts)}" if (parts := getattr(task, "trained_parts", ())) else "")]
    if before and before.best:
        score = "" if before.score is None else f" ({before.monitor} {number(before.score)})"
        words.append(f"from the best weights of {before.name}{score}")
    elif stage.ckpt_path:
        words.append(f"resumed from {stage.ckpt_path}")
    console.print(", ".join(words), soft_wrap=True, highlight=False)


def log_stage(fitted: Fitted, trainer: pl.Trainer) -> None:
    """Log what a recipe's stage came to, once, so that it stands in the summary of the run."""
    if fitted.name is None:
        return
    figures = {fitted.monitor: fitted.score, "epochs": fitted.epochs, "seconds": fitted.seconds}
    values = {f"stages/{fitted.name}/{name}": float(value) for name, value in figures.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=fitted.steps)
        logger.save()
