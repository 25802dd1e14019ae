"""Attack a split network: what an adversary rebuilds of the images from the decoded bytes, beside controls."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("attack")

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.reports.attacks.information import print_information
from cleave.reports.attacks.tables import csv_rows, print_attacks
from cleave.reports.terminal import say
from cleave.scripts.assembly.attacking.carried_out import CarriedOut, carried_out, prepared, write_report
from cleave.scripts.assembly.attacking.settings import checked
from cleave.scripts.assembly.building import instantiate_each, plain
from cleave.scripts.assembly.hints import next_command, vouching


@recorded_outcome()
def attack(cfg: DictConfig) -> dict[str, Path]:
    """Run what the config asks for, print it, and return the files written by their names."""
    settings = checked(cfg)
    pl.seed_everything(settings["seed"], workers=True, verbose=False)
    given = prepared(cfg, settings)
    victim = given.victim
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams({**plain(cfg), "trained": victim.trained})
    found = carried_out(settings, given)
    print_attacks(f"{victim.name}, payload of {victim.releases.at}", found.attacks)
    print_information(found.information)
    files = write_report(Path(cfg.paths.output_dir), found)
    for logger in loggers:
        log_attacks(logger, found, files)
    for file in files.values():
        say(f"Written: {file}")
    if victim.network is not None:
        next_command("export", {"ckpt_path": cfg.ckpt_path} | vouching(victim.trained))
    else:
        next_command("infer", {"bundle": cfg.bundle}, "input=…")
    return files


def log_attacks(logger: Any, found: CarriedOut, files: dict[str, Path]) -> None:
    """Give a logger the headlines; W&B also gets the grid, the table and the files."""
    metrics = {"attack/mean_image_mse": found.report["mean_image_mse"]}
    for headline in found.report["headlines"]:
        end = "" if headline["releases"] == 1 else f"_of_{headline['releases']}_releases"
        metrics |= {f"attack/{name}{end}": headline[name]["value"] for name in ("mse", "explained")}
    metrics |= {f"attack/{each.key}": each.bits.value for each in found.information.bounds}
    logger.log_metrics(metrics)
    rows = csv_rows(found.attacks)
    log_report(logger, "attacks", list(rows[0]), [list(row.values()) for row in rows], files)


def main(cfg: DictConfig) -> None:
    """Attack a checkpoint or a bundle."""
    attack(cfg)
