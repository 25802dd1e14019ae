"""Train: data → network → task → callbacks → loggers → trainer → fit → test → bundle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import LearningRateMonitor, Timer
from pytorch_lightning.utilities import rank_zero_only

from architectures import profile
from lightning_modules import Task
from lightning_modules.callbacks import CheckpointMetadata, WandbTracking
from lightning_modules.callbacks.tracking import log_artifact, recorded_outcome, wandb_run
from scripts.assembly import (
    Assembly,
    assemble,
    build_task,
    instantiate_each,
    load_strictly,
    network_state,
    plain,
    read_checkpoint,
    restore,
)
from scripts.bundling import example_input, write_bundle
from scripts.measured import measured_points
from scripts.recipe import Stage, stages
from scripts.results import RESULTS, write_results
from scripts.terminal import CONF, console, friendly, next_command, profile_rows, quiet, results_table, start, table


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run what the config describes and return the metrics measured."""
    refuse_subprocess_sweep(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    todo = stages(cfg)
    parts = assemble(todo[0].config)
    # What cannot be built or resumed from is told before any training time is spent, of the last stage too.
    tasks = [build_task(stage.config, parts.network, parts.data.class_names, **parts.teaching) for stage in todo]
    if cfg.ckpt_path:
        state = network_state(read_checkpoint(cfg.ckpt_path))
        load_strictly(parts.network, state, f"the checkpoint {cfg.ckpt_path}")
    loggers = instantiate_each(cfg.get("logger"))
    tasks[0].freeze()  # the last one built has left its own parts frozen
    log_setup(loggers, plain(cfg), parts)
    done: list[Fitted] = []
    for stage, task in zip(todo, tasks, strict=True):
        done.append(fit(stage, task, parts, loggers, done[-1] if done else None))
    trainer, best = done[-1].trainer, done[-1].best
    metrics = dict(trainer.callback_metrics)
    if cfg.test:
        checkpoint = best or (None if cfg.train else cfg.ckpt_path)
        trainer.test(tasks[-1], datamodule=parts.data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        metrics |= trainer.callback_metrics
    if trainer.is_global_zero:
        finish(cfg, parts, done, metrics)
    return {name: float(value) for name, value in metrics.items()}


class Fitted(NamedTuple):
    """A stage that was fitted.

    Attributes:
        stage: The stage.
        trainer: Its trainer.
        best: Its best checkpoint, ``None`` where none was saved.
        accuracy: Validation accuracy of that checkpoint, or after the last epoch.
        steps: Steps that the loggers have seen, those of the stages before included.
        seconds: Wall-clock seconds of training, validation included; over all of a stage that was resumed.
    """

    stage: Stage
    trainer: pl.Trainer
    best: str | None
    accuracy: float
    steps: int
    seconds: float


def fit(stage: Stage, task: Task, parts: Assembly, loggers: list[Any], before: Fitted | None) -> Fitted:
    """Fit one stage, from the best weights of the one before it."""
    cfg = stage.config
    callbacks = instantiate_each(cfg.get("callbacks"))
    if not loggers:  # Lightning refuses to watch the rate where nothing writes it down
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    timer = Timer()
    callbacks += [timer, CheckpointMetadata(plain(cfg), parts.data.class_names, parts.data.input), WandbTracking()]
    trainer: pl.Trainer = instantiate(cfg.trainer, _partial_=True)(callbacks=callbacks, logger=loggers)
    if before is not None:
        # The loggers' steps go on where the stage before ended; each trainer would begin at 0.
        trainer.fit_loop.epoch_loop._batches_that_stepped = before.steps
        if before.best:
            load_strictly(parts.network, network_state(read_checkpoint(before.best)), f"the checkpoint {before.best}")
    if cfg.train:
        if stage.name:
            rank_zero_only(console.rule)(f"stage {stage.name}: {stage.method.lower()}")
        trainer.fit(task, datamodule=parts.data, ckpt_path=stage.ckpt_path, weights_only=True)
    checkpoint: Any = trainer.checkpoint_callback
    best = getattr(checkpoint, "best_model_path", "") or None
    score = checkpoint.best_model_score if best else trainer.callback_metrics.get("val/acc")
    accuracy = math.nan if score is None else float(score)
    steps = trainer.fit_loop.epoch_loop._batches_that_stepped
    return Fitted(stage, trainer, best, accuracy, steps, timer.time_elapsed("train"))


def finish(cfg: DictConfig, parts: Assembly, done: list[Fitted], metrics: dict[str, Any]) -> None:
    """Print what was measured, where it lies and what to do next; write the bundle if asked."""
    trainer, best = done[-1].trainer, done[-1].best
    if cfg.get("stages") is not None and cfg.train:
        rows = [(d.stage.name, d.stage.method, d.trainer.current_epoch, f"{100 * d.accuracy:.2f} %") for d in done]
        table("Stages", rows, ("stage", "method", "epochs", "best val/acc"))
    results_table("Results", {k: v for k, v in metrics.items() if k.startswith(("val/", "test/"))})
    cost = profile(parts.network, parts.data.input.shape)
    table("Cost per image", profile_rows(cost), ("part", "MACs", "parameters"))
    if best:
        console.print(f"Checkpoint: {best}", soft_wrap=True, highlight=False)
    whole = not cfg.ckpt_path or cfg.get("stages") is None
    found = measured_points(
        cfg,
        " → ".join(d.stage.method for d in done),
        metrics,
        cost,
        epochs=sum(d.trainer.current_epoch for d in done) if whole else None,
        seconds=sum(d.seconds for d in done) if whole else None,
        checkpoint=best,
    )
    if found:
        file = Path(cfg.paths.output_dir) / RESULTS
        write_results(file, found)
        console.print(f"Results: {file} (python scripts/compare.py 'inputs=[…]' puts runs side by side)", soft_wrap=True)
    if cfg.export:
        # Of the file, as under `ddp_spawn` only the ranks' own networks went back to the best weights.
        network = restore(best, trusted=True).network if best else parts.network
        bundle = write_bundle(
            network,
            parts.data,
            Path(cfg.paths.output_dir) / "bundle",
            config=plain(done[-1].stage.config),
            metrics=metrics,
            overwrite=True,
        )
        if run := wandb_run(trainer):
            log_artifact(run, bundle, kind="bundle", name="bundle")
        next_command(f"python scripts/infer.py bundle={bundle} input={example_input(parts.data)}")
    elif best:
        next_command(f"python scripts/export.py ckpt_path={best}")


def log_setup(loggers: list[Any], resolved: dict[str, Any], parts: Assembly) -> None:
    """Give every logger the resolved config and what each part of the network costs."""
    trainable = sum(p.numel() for p in parts.network.parameters() if p.requires_grad)
    cost = {**profile(parts.network, parts.data.input.shape), "trainable_params": trainable}
    for logger in loggers:
        logger.log_hyperparams({**resolved, "cost": cost})


def refuse_subprocess_sweep(cfg: DictConfig) -> None:
    """A sweep under subprocess ``ddp`` would give each rank other hyper-parameters without a word.

    Raises:
        ValueError: A Hydra multirun asks for a strategy that launches subprocesses.
    """
    strategy = str(cfg.trainer.get("strategy") or "auto")
    in_process = ("spawn", "fork", "notebook")
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    many = str(cfg.trainer.get("devices")) != "1" or int(cfg.trainer.get("num_nodes") or 1) > 1
    if sweeping and many and not any(word in strategy for word in in_process):
        raise ValueError(
            f"a multirun with trainer.strategy={strategy} on several devices would launch ranks with other "
            "hyper-parameters than the job's; use trainer.devices=1, trainer.strategy=ddp_spawn, or single runs"
        )


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@friendly
def main(cfg: DictConfig) -> float | None:
    """Train and return the optimised metric to the sweeper."""
    with recorded_outcome():
        metrics = train(cfg)
        if cfg.train and cfg.optimized_metric and cfg.optimized_metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise ValueError(f"optimized_metric={cfg.optimized_metric} was not measured; measured were {known}")
    return metrics.get(cfg.optimized_metric)


if __name__ == "__main__":
    start(main)
elif __name__ == "__mp_main__":  # a rank of ddp_spawn
    quiet()
