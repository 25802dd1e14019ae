"""Evaluate a checkpoint: everything is rebuilt from the file; only the images must still be there."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from cleave.architectures import SplitNetwork, profile
from cleave.lightning_modules.callbacks.tracking import recorded_outcome
from cleave.reports.rates.measured import measured_points
from cleave.reports.rates.results import RESULTS, write_results
from cleave.reports.terminal import next_command, profile_rows, results_table, table
from cleave.scripts.assembly.building import build_task, instantiate_each, plain
from cleave.scripts.assembly.bundling import recalibrate
from cleave.scripts.assembly.recipe import Stage
from cleave.scripts.assembly.restoring import Restored, restore, restore_data
from cleave.scripts.assembly.terminal import CONF, friendly, start


@recorded_outcome()
def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Measure a checkpoint on its validation or test images and return the metrics."""
    if cfg.split not in ("val", "test"):
        raise ValueError(f"split must be val or test, got {cfg.split!r}")
    restored = restore(cfg.ckpt_path, bits=cfg.codec.bits, trusted=cfg.trust_checkpoint)
    if cfg.seed is not None:
        restored.config.method.seed = cfg.seed
    pl.seed_everything(restored.config.method.seed, workers=True, verbose=False)
    data = restore_data(restored, cfg.data)
    # BatchNorm is measured over the link of training, as it was in training; only then comes the one to test.
    variant = [recalibrate(restored, data, cfg.recalibrate), set_channel(restored, cfg.get("channel"))]
    task = build_task(restored.config, restored.network, restored.class_names)
    loggers = instantiate_each(cfg.get("logger"))
    trainer: pl.Trainer = instantiate(cfg.trainer, _partial_=True)(logger=loggers, enable_checkpointing=False)
    run = trainer.test if cfg.split == "test" else trainer.validate
    run(task, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not trainer.is_global_zero:
        return metrics
    results_table(f"{cfg.ckpt_path} on {cfg.split}", metrics)
    costs = profile(restored.network, data.input.shape)
    table("Cost per image", profile_rows(costs), ("part", "MACs", "parameters"))
    config = restored.config
    method = " → ".join(config.stages.values()) if config.get("stages") else Stage(None, config, None).method
    name = ", ".join([method, *filter(None, variant)])
    points = measured_points(config, name, metrics, costs, epochs=None, seconds=None, checkpoint=str(cfg.ckpt_path))
    if points:
        write_results(Path(cfg.paths.output_dir) / RESULTS, points)
    bits = f" codec.bits={cfg.codec.bits}" if restored.other_bits else ""
    next_command(f"python scripts/export.py ckpt_path={cfg.ckpt_path}{bits}")
    return metrics


def set_channel(restored: Restored, channel: DictConfig | None) -> str | None:
    """Put another link between the parts than the one trained with, and return it in words; ``None`` changes nothing.

    Raises:
        ValueError: The network is not split, or the link cannot carry what it sends.
    """
    if channel is None:
        return None
    if not isinstance(restored.network, SplitNetwork):
        raise ValueError(f"channel={channel.kind} has no meaning: the checkpoint's network is not split")
    restored.network.set_channel(plain(channel))
    link = restored.network.channel
    if link is None or not link.active:
        return "perfect link"
    level = channel.rate if "rate" in channel else f"{channel.snr_db} dB"
    return f"{str(channel.kind).replace('_', ' ')} {level}"


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
@friendly
def main(cfg: DictConfig) -> None:
    """Evaluate a checkpoint."""
    evaluate(cfg)


if __name__ == "__main__":
    start(main)
