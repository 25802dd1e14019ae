"""Export a checkpoint as a bundle of partitions for a device and a server."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from cleave.architectures import SplitNetwork
from cleave.deployment import check_target
from cleave.lightning_modules import ExitTask
from cleave.lightning_modules.callbacks.tracking import WandbTracking, log_artifact, recorded_outcome, wandb_run
from cleave.reports.terminal import next_command, results_table
from cleave.scripts.assembly.building import build_task, instantiate_each, plain
from cleave.scripts.assembly.bundling import example_input, recalibrate, write_bundle
from cleave.scripts.assembly.exit_bundling import chosen_exits
from cleave.scripts.assembly.restoring import restore, restore_data
from cleave.scripts.assembly.terminal import CONF, friendly, start


@recorded_outcome()
def export(cfg: DictConfig) -> Path:
    """Test the checkpoint once more, write the bundle, and return its folder."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    check_target(cfg.bundle, cfg.overwrite)
    restored = restore(cfg.ckpt_path, bits=cfg.codec.bits, trusted=cfg.trust_checkpoint)
    data = restore_data(restored, cfg.data)
    exits = chosen_exits(restored.network, data.input, restored.config, cfg.exits)
    recalibrate(restored, data, cfg.recalibrate)
    if isinstance(restored.network, SplitNetwork):
        restored.network.set_channel(None)  # a bundle is measured through its bytes, which its runtime delivers whole
    loggers = instantiate_each(cfg.get("logger"))
    trainer: pl.Trainer = instantiate(cfg.trainer, _partial_=True)(
        callbacks=[WandbTracking()], logger=loggers, enable_checkpointing=False
    )
    if trainer.world_size > 1:
        raise ValueError("export runs on one device; add trainer.devices=1")
    for logger in trainer.loggers:
        logger.log_hyperparams({**plain(cfg), "trained": plain(restored.config)})
    task = build_task(restored.config, restored.network, restored.class_names)
    if isinstance(task, ExitTask):
        task.use_policy(exits.policy)
    trainer.test(task, datamodule=data, verbose=False)
    metrics = dict(trainer.callback_metrics)
    results_table(f"{cfg.ckpt_path} on test", metrics)
    config = plain(restored.config)
    if restored.other_bits:
        config["recalibrate"] = plain(cfg.recalibrate)
    bundle = write_bundle(
        restored.network,
        data,
        Path(cfg.bundle),
        config=config,
        metrics=metrics,
        sample=cfg.sample,
        exits=exits,
        overwrite=cfg.overwrite,
    )
    if run := wandb_run(trainer):
        log_artifact(run, bundle, kind="bundle", name="bundle")
    next_command(f"python scripts/infer.py bundle={bundle} input={example_input(data)}")
    return bundle


@hydra.main(version_base="1.3", config_path=CONF, config_name="export")
@friendly
def main(cfg: DictConfig) -> None:
    """Export a checkpoint."""
    export(cfg)


if __name__ == "__main__":
    start(main)
