"""Export a checkpoint as a bundle of partitions for a device and a server."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("export")

from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from cleave.deployment import check_target
from cleave.lightning_modules.callbacks.tracking import WandbTracking, log_artifact, recorded_outcome, wandb_run
from cleave.reports.answers import say_if_larger
from cleave.reports.rates.measured import measured_points
from cleave.reports.terminal import results_table
from cleave.scripts.assembly.building import build_measured, build_trainer, instantiate_each, plain
from cleave.scripts.assembly.bundling import chosen_exits, example_input, recalibrate, write_bundle
from cleave.scripts.assembly.hints import next_command
from cleave.scripts.assembly.networks import choose_envelope
from cleave.scripts.assembly.outcome import run_of
from cleave.scripts.assembly.restoring import restore, restore_data


@recorded_outcome()
def export(cfg: DictConfig) -> Path:
    """Test the checkpoint once more, write the bundle, and return its folder."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    check_target(cfg.bundle, cfg.overwrite)
    restored = restore(cfg.ckpt_path, bits=cfg.codec.bits, trusted=cfg.trust_checkpoint)
    if cfg.split.envelope is not None:
        choose_envelope(restored.network, cfg.split.envelope)
        restored.config.split.envelope = cfg.split.envelope
    data = restore_data(restored, cfg.data)
    exits = chosen_exits(restored.network, data, restored.config, cfg.exits, cfg.links)
    recalibrate(restored, data, cfg.recalibrate)
    restored.network.set_channel(None)  # a bundle is measured through its bytes, which its runtime delivers whole
    loggers = instantiate_each(cfg.get("logger"))
    trainer = build_trainer(cfg, callbacks=[WandbTracking()], logger=loggers, enable_checkpointing=False)
    if trainer.world_size > 1:
        raise ValueError("export runs on one device; add trainer.devices=1")
    for logger in trainer.loggers:
        logger.log_hyperparams({**plain(cfg), "trained": plain(restored.config)})
    task = build_measured(restored.config, restored.network, restored.class_names, policy=exits.policy)
    trainer.test(task, datamodule=data, verbose=False)
    metrics = dict(trainer.callback_metrics)
    results_table(f"{cfg.ckpt_path} on test", metrics)
    say_if_larger(metrics)
    config = plain(restored.config)
    if restored.other_bits:
        config["recalibrate"] = plain(cfg.recalibrate)
    bundle = write_bundle(
        restored.network,
        data,
        Path(cfg.bundle),
        config=config,
        metrics=metrics,
        measured=task.measured(),
        points=measured_points(run_of(restored, str(cfg.ckpt_path)), task.measured(), restored.network),
        sample=cfg.sample,
        exits=exits,
        overwrite=cfg.overwrite,
    )
    if run := wandb_run(trainer):
        log_artifact(run, bundle, kind="bundle", name="bundle")
    next_command("infer", {"bundle": bundle, "input": example_input(data)})
    return bundle


def main(cfg: DictConfig) -> None:
    """Export a checkpoint."""
    export(cfg)
