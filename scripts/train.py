"""Train: data → network → task → callbacks → loggers → trainer → fit → test → bundle."""

from __future__ import annotations

from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cleave.architectures import profile
from cleave.lightning_modules.callbacks.metadata import KEY
from cleave.lightning_modules.callbacks.tracking import recorded_outcome
from cleave.scripts.assembly.building import Assembly, assemble, instantiate_each, plain
from cleave.scripts.assembly.exit_bundling import chosen_exits
from cleave.scripts.assembly.fitting import Fit, Fitted, fit, prepare, tested
from cleave.scripts.assembly.outcome import finish
from cleave.scripts.assembly.recipe import stages
from cleave.scripts.assembly.restoring import load_strictly, network_state, read_checkpoint
from cleave.scripts.assembly.terminal import CONF, friendly, quiet, start


@recorded_outcome()
def train(cfg: DictConfig) -> dict[str, Any]:
    """Run what the config describes and return the metrics measured."""
    refuse_subprocess_sweep(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    checkpoint = read_checkpoint(cfg.ckpt_path) if cfg.ckpt_path else None
    todo = stages(cfg, checkpoint)
    parts = assemble(todo[0].config)
    loggers = instantiate_each(cfg.get("logger"))
    # What cannot be built or resumed from is told before any training time is spent, of the last stage too.
    fits = [prepare(stage, parts, loggers) for stage in todo]
    if cfg.export:
        chosen_exits(parts.network, parts.data.input, todo[-1].config)
    done: list[Fitted] = []
    if checkpoint:
        load_strictly(parts.network, network_state(checkpoint), f"the checkpoint {cfg.ckpt_path}")
        done = [Fitted(**before) for before in checkpoint[KEY].get("before", [])]
    log_setup(loggers, plain(cfg), parts, fits)
    for this in fits:
        done.append(fit(this, parts, done) if cfg.train else tested(this))
    task, trainer, best = fits[-1].task, fits[-1].trainer, done[-1].best
    metrics = dict(trainer.callback_metrics)
    if cfg.test:
        tested_file = best or (None if cfg.train else cfg.ckpt_path)
        trainer.test(task, datamodule=parts.data, ckpt_path=tested_file, weights_only=True, verbose=False)
        metrics |= trainer.callback_metrics
    shipped = metrics
    if cfg.test and cfg.export and getattr(parts.network, "channel", None) is not None:
        # A bundle is measured through its bytes, which its runtime delivers whole; the loggers keep the link's numbers.
        parts.network.set_channel(None)  # type: ignore[operator]
        trainer.loggers = []
        trainer.test(task, datamodule=parts.data, ckpt_path=tested_file, weights_only=True, verbose=False)
        trainer.loggers = loggers
        shipped = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    if trainer.is_global_zero:
        finish(fits[-1].stage.config, parts, done, metrics, shipped, trainer)
    return {name: float(value) for name, value in metrics.items()}


def log_setup(loggers: list[Any], resolved: dict[str, Any], parts: Assembly, fits: list[Fit]) -> None:
    """Give every logger the resolved config, what each part of the network costs, and what each stage trains."""
    trainable: dict[str | None, int] = {}
    for this in fits:
        this.task.freeze_parts()
        trainable[this.stage.name] = sum(p.numel() for p in parts.network.parameters() if p.requires_grad)
    fits[0].task.freeze_parts()  # the last one has left its own parts frozen
    cost = {**profile(parts.network, parts.data.input.shape), "trainable_params": trainable.get(None, trainable)}
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
