"""The fits of a run, one step after another, each from the best weights of the one before it."""

from __future__ import annotations

import functools
import inspect
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.utilities import rank_zero_only

from cleave.lightning_modules import Task
from cleave.lightning_modules.callbacks import (
    CheckpointMetadata,
    FitRecord,
    LastCheckpoint,
    ResumedSchedule,
    StepMarker,
    WandbTracking,
)
from cleave.lightning_modules.checkpoints.loading import load_strictly, network_state, read_checkpoint
from cleave.lightning_modules.defending import check_batches
from cleave.reports.terminal import console, number, say
from cleave.scripts.assembly.building import Assembly, build_task, build_trainer, instantiate_each, plain
from cleave.scripts.assembly.given.resumed import overrides
from cleave.scripts.assembly.recipe import Step
from cleave.scripts.assembly.starting.stopping import forwarding, used_up


class Fit(NamedTuple):
    """A step with what fits it, built before any step is trained."""

    step: Step
    task: Task
    trainer: pl.Trainer
    metadata: CheckpointMetadata
    record: FitRecord


class Fitted(NamedTuple):
    """What a step came to; the checkpoints of the steps behind it carry it.

    Attributes:
        name: The step's name, ``None`` where the run is no recipe.
        method: Its method in words.
        epochs: Epochs trained, those before a resume included; ``None`` where it was only tested.
        steps: Optimizer steps that the loggers have seen, those of the recipe's steps before included.
        seconds: Wall-clock seconds of training, validation included; ``None`` where it was only tested.
        monitor: The metric by which its best checkpoint was chosen.
        score: What that metric was.
        best: The best checkpoint, ``None`` where none was saved; the last one of a recipe's step whose method has no
            terms of its own, as no metric of the network says how far that one is.
    """

    name: str | None
    method: str
    epochs: int | None
    steps: int
    seconds: float | None
    monitor: str
    score: float | None
    best: str | None


def prepare(step: Step, parts: Assembly, loggers: list[Any]) -> Fit:
    """Build a step's task, callbacks and trainer, so that what cannot be built is named before any step is trained."""
    cfg = step.config
    with step.naming_mistakes():
        task = build_task(cfg, parts.network, parts.data.class_names, parts.others)
        _check_start(task, parts)
        rehearse(task)
        cfg.training.monitor = task.monitor
        cfg.callbacks = _watching(cfg.get("callbacks"), task.monitor)
        callbacks = instantiate_each(cfg.get("callbacks"))
        if not loggers:  # Lightning refuses to watch the rate where nothing writes it down
            callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
        if parts.host is not None:
            cfg.host = parts.host  # so that the network can be built again without the host's file
        cfg.cuts, cfg.trained = list(parts.network.cuts), list(task.trained_parts)
        metadata = CheckpointMetadata(plain(cfg), parts.data.class_names, parts.data.input, overrides())
        record = FitRecord(plain(cfg)["trainer"].get("max_time"))
        callbacks += [record, metadata, ResumedSchedule(), WandbTracking(step=step.name)]
        if step.name:
            callbacks.append(StepMarker(step.number))
        trainer = build_trainer(cfg, callbacks=callbacks, logger=loggers)
        check_batches(dict(task.named_terms()), trainer, parts.data, last=False)
    return Fit(step, task, trainer, metadata, record)


def _watching(callbacks: Any, monitor: str) -> Any:
    """Let callbacks whose metric is left open watch that of the task."""
    for callback in (callbacks or {}).values():
        if callback is not None and "monitor" in callback and callback.monitor is None:
            callback.monitor = monitor
    return callbacks


def _check_start(task: Task, parts: Assembly) -> None:
    """Refuse to learn from nobody, and to freeze what nobody has trained.

    Raises:
        ValueError: A term reads a network that is not there; or a part of the backbone is frozen, and its weights are
            random.
    """
    if "teacher" in task.asked and not parts.others:
        raise ValueError(
            f"{type(task).__name__} needs a teacher: the pretrained backbone would be one, but it has random weights; "
            "give base.ckpt_path=FILE, teacher.ckpt_path=FILE, backbone.weights=FILE or backbone.pretrained=true"
        )
    frozen = [name for name in parts.network.backbone_parts if name not in task.trained_parts]
    if parts.from_scratch and frozen:
        raise ValueError(
            f"the {frozen[0]} would stay frozen with random weights; give base.ckpt_path=FILE, backbone.weights=FILE "
            "or backbone.pretrained=true, or train it as well"
        )


def rehearse(task: Task) -> None:
    """Build the optimizer, and hold the scheduler's arguments against its signature.

    Raises:
        TypeError: One of them takes no such argument.
        ValueError: Nothing is trainable, or an argument is out of range.
    """
    task.freeze_parts()  # the last task built has left its own parts frozen
    task.settings.optimizer(task.parameter_groups())
    if isinstance(factory := task.settings.scheduler, functools.partial):
        try:
            inspect.signature(factory.func).bind(None, *factory.args, **factory.keywords)
        except TypeError as error:
            raise TypeError(f"training.scheduler: {factory.func.__name__}: {error}") from error


def fit(planned: Fit, parts: Assembly, before: list[Fitted]) -> Fitted:
    """Fit one step; ``before`` are those that came before it."""
    step, task, trainer, metadata, record = planned
    progress = trainer.fit_loop.epoch_loop
    metadata.before = [fitted._asdict() for fitted in before]
    last = before[-1] if before and not step.ckpt_path else None
    if last:
        # The loggers' steps go on where the step before ended; each trainer would begin at 0.
        progress._batches_that_stepped = last.steps
        if last.best:
            checkpoint = read_checkpoint(last.best)
            load_strictly(parts.network, network_state(checkpoint), f"the checkpoint {last.best}")
            task.take_over_terms(checkpoint["state_dict"])
    if step.ckpt_path:  # a run may be resumed in the folder that it left
        warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
    if step.name:
        announce(planned, last)
    with forwarding(trainer):
        trainer.fit(task, datamodule=parts.data, ckpt_path=step.ckpt_path, weights_only=True)
    used_up(trainer)
    say_verdicts(task)
    progress._batches_that_stepped = record.steps  # of this process, where ranks of their own fitted
    fitted = only_tested(planned)._replace(
        epochs=record.epochs, steps=record.steps, seconds=record.seconds, score=record.score
    )
    log_step(fitted, trainer)
    return fitted


@rank_zero_only
def say_verdicts(task: Task) -> None:
    """Print what terms have to say of a training, such as whether a bound holds."""
    for name, term in task.named_terms():
        if (verdict := getattr(term.loss, "verdict", None)) is not None:
            say(f"Term {name}: {verdict}")
    if task.private is not None:
        say(f"DP-SGD: {task.private.verdict}. Of this training alone: what a base or teacher learned is not covered")


def only_tested(planned: Fit) -> Fitted:
    """What is known of a step that is not fitted."""
    checkpoint: Any = planned.trainer.checkpoint_callback
    monitor = getattr(checkpoint, "monitor", None) or "val/acc"
    best = getattr(checkpoint, "best_model_path", "") or None
    if planned.step.name is not None and not planned.task.own_terms:
        lasts = (each for each in planned.trainer.checkpoint_callbacks if isinstance(each, LastCheckpoint))
        best = next((str(each.best_model_path) for each in lasts if each.best_model_path), best)
    return Fitted(planned.step.name, planned.step.method, None, 0, None, monitor, None, best)


@rank_zero_only
def announce(planned: Fit, before: Fitted | None) -> None:
    """Say which step begins, what it trains and where it starts from."""
    step, task = planned.step, planned.task
    console.rule(f"step {step.number} of {len(step.config.steps)}: {step.name}")
    words = [step.method + (f" of {', '.join(task.trained_parts)}" if task.trained_parts else "")]
    if before and before.best:
        score = "" if before.score is None else f" ({before.monitor} {number(before.score)})"
        which = "last" if Path(before.best).name == "last.ckpt" else "best"
        words.append(f"from the {which} weights of {before.name}{score}")
    elif step.ckpt_path:
        words.append(f"resumed from {step.ckpt_path}")
    say(", ".join(words))


def log_step(fitted: Fitted, trainer: pl.Trainer) -> None:
    """Log what a recipe's step came to, once, so that it stands in the summary of the run."""
    if fitted.name is None:
        return
    figures = {fitted.monitor: fitted.score, "epochs": fitted.epochs, "seconds": fitted.seconds}
    values = {f"steps/{fitted.name}/{name}": float(value) for name, value in figures.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=fitted.steps)
        logger.save()
