"""Train: data → network → task → callbacks → loggers → trainer → fit → test → bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import LearningRateMonitor

from architectures import profile
from lightning_modules.callbacks import CheckpointMetadata, WandbTracking
from lightning_modules.callbacks.tracking import log_artifact, recorded_outcome, wandb_run
from scripts.assembly import (
    Assembly,
    assemble,
    instantiate_each,
    load_strictly,
    network_state,
    plain,
    read_checkpoint,
    restore,
)
from scripts.bundling import example_input, write_bundle
from scripts.terminal import CONF, console, friendly, next_command, profile_rows, quiet, results_table, start, table


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run what the config describes and return the metrics measured."""
    refuse_subprocess_sweep(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    parts = assemble(cfg)
    if cfg.ckpt_path:  # what cannot be resumed from is told before any training time is spent
        state = network_state(read_checkpoint(cfg.ckpt_path))
        load_strictly(parts.network, state, f"the checkpoint {cfg.ckpt_path}")
    resolved = plain(cfg)
    loggers = instantiate_each(cfg.get("logger"))
    callbacks = instantiate_each(cfg.get("callbacks"))
    if not loggers:  # Lightning refuses to watch the rate where nothing writes it down
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    callbacks += [CheckpointMetadata(resolved, parts.data.class_names, parts.data.input), WandbTracking()]
    trainer: pl.Trainer = instantiate(cfg.trainer, _partial_=True)(callbacks=callbacks, logger=loggers)
    log_setup(trainer, resolved, parts)

    if cfg.train:
        trainer.fit(parts.task, datamodule=parts.data, ckpt_path=cfg.ckpt_path, weights_only=True)
    metrics = dict(trainer.callback_metrics)
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    if cfg.test:
        checkpoint = best or (None if cfg.train else cfg.ckpt_path)
        trainer.test(parts.task, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        metrics |= trainer.callback_metrics
    if trainer.is_global_zero:
        finish(cfg, parts, trainer, metrics, best)
    return {name: float(value) for name, value in metrics.items()}


def finish(cfg: DictConfig, parts: Assembly, trainer: pl.Trainer, metrics: dict[str, Any], best: str | None) -> None:
    """Print what was measured, where it lies and what to do next; write the bundle if asked."""
    results_table("Results", {k: v for k, v in metrics.items() if k.startswith(("val/", "test/"))})
    table(
        "Cost per image", profile_rows(profile(parts.network, parts.data.input.shape)), ("part", "MACs", "parameters")
    )
    if best:
        console.print(f"Checkpoint: {best}", soft_wrap=True, highlight=False)
    if cfg.export:
        # Of the file, as under `ddp_spawn` only the ranks' own networks went back to the best weights.
        network = restore(best, trusted=True).network if best else parts.network
        bundle = write_bundle(
            network,
            parts.data,
            Path(cfg.paths.output_dir) / "bundle",
            config=plain(cfg),
            metrics=metrics,
            overwrite=True,
        )
        if run := wandb_run(trainer):
            log_artifact(run, bundle, kind="bundle", name="bundle")
        next_command(f"python scripts/infer.py bundle={bundle} input={example_input(parts.data)}")
    elif best:
        next_command(f"python scripts/export.py ckpt_path={best}")


def log_setup(trainer: pl.Trainer, resolved: dict[str, Any], parts: Assembly) -> None:
    """Give every logger the resolved config and what each part of the network costs."""
    trainable = sum(p.numel() for p in parts.network.parameters() if p.requires_grad)
    cost = {**profile(parts.network, parts.data.input.shape), "trainable_params": trainable}
    for logger in trainer.loggers:
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
