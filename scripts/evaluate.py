"""Evaluate a checkpoint: everything is rebuilt from the file; only the images must still be there."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("evaluate")

from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from cleave.lightning_modules.callbacks.tracking import recorded_outcome
from cleave.reports.answers import say_if_larger
from cleave.reports.rates.measured import measured_points
from cleave.reports.rates.results import RESULTS, write_results
from cleave.reports.terminal import cost_rows, results_table, table
from cleave.scripts.assembly.building import build_measured, build_trainer, instantiate_each, plain
from cleave.scripts.assembly.bundling import recalibrate
from cleave.scripts.assembly.hints import next_command, vouching
from cleave.scripts.assembly.linking.report import path_record, path_table
from cleave.scripts.assembly.networks import build_channel, keyed
from cleave.scripts.assembly.outcome import run_of, say_promises
from cleave.scripts.assembly.restoring import Restored, restore, restore_data


@recorded_outcome()
def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Measure a checkpoint on its validation or test images and return the metrics."""
    if cfg.split not in ("val", "test"):
        raise ValueError(f"split must be val or test, got {cfg.split!r}")
    restored = restore(cfg.ckpt_path, bits=cfg.codec.bits, trusted=cfg.trust_checkpoint)
    if cfg.seed is not None:
        restored.config.training.seed = cfg.seed
    pl.seed_everything(restored.config.training.seed, workers=True, verbose=False)
    data = restore_data(restored, cfg.data)
    # BatchNorm is measured over the link of training, as it was in training; only then comes the one to test.
    variant = [recalibrate(restored, data, cfg.recalibrate), set_channel(restored, cfg.get("channel"))]
    task = build_measured(restored.config, restored.network, restored.class_names)
    loggers = instantiate_each(cfg.get("logger"))
    trainer = build_trainer(cfg, logger=loggers, enable_checkpointing=False)
    run = trainer.test if cfg.split == "test" else trainer.validate
    run(task, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not trainer.is_global_zero:
        return metrics
    results_table(f"{cfg.ckpt_path} on {cfg.split}", metrics)
    say_if_larger(metrics)
    table("Cost per image", cost_rows(restored.network.costs()), ("part", "MACs", "parameters"))
    say_promises(restored.network)
    path = path_record(restored.network, metrics)
    path_table(path)
    run_words = run_of(restored, str(cfg.ckpt_path), *variant)
    points = measured_points(run_words, task.measured() if cfg.split == "test" else None, restored.network)
    if points and points[0].kind == "run":
        write_results(Path(cfg.paths.output_dir) / RESULTS, points, path=path)
    settings = {"ckpt_path": cfg.ckpt_path} | ({"codec.bits": cfg.codec.bits} if restored.other_bits else {})
    next_command("export", settings | vouching(plain(restored.config)))
    return metrics


def set_channel(restored: Restored, channel: DictConfig | None) -> str | None:
    """Put another link between the parts than the one trained with, and return it in words; ``None`` changes nothing.

    Raises:
        ValueError: The network is not split, or the link cannot carry what it sends.
    """
    if channel is None:
        return None
    if not restored.network.bottlenecks:
        raise ValueError("channel has no meaning: the checkpoint's network is not split")
    link = build_channel(channel)
    with keyed("channel", channel):
        restored.network.set_channel(link)
    if link is None or not link.at_evaluation:
        return "perfect link"
    return link.in_words()


def main(cfg: DictConfig) -> float | None:
    """Evaluate a checkpoint and return its accuracy, which a sweep shows."""
    return evaluate(cfg).get(f"{cfg.split}/acc")
