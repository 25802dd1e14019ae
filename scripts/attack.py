"""Attack a split network: what an adversary rebuilds of the images from the decoded bytes, beside controls."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("attack")

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import Tensor

from cleave.deployment.bundle.canonical_json import dump
from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.reports.attacks.pictures import grid
from cleave.reports.attacks.results import ATTACKER, Attack, as_values, headlines, strongest
from cleave.reports.attacks.tables import csv_rows, print_attacks
from cleave.reports.csv_file import write_csv
from cleave.reports.terminal import say
from cleave.scripts.assembly.attacking.images import AttackImages, images_of
from cleave.scripts.assembly.attacking.settings import checked
from cleave.scripts.assembly.attacking.study import Study
from cleave.scripts.assembly.attacking.victim import Victim, judge_of, victim_of
from cleave.scripts.assembly.building import instantiate_each, plain
from cleave.scripts.assembly.hints import next_command, vouching

SCHEMA = 1
REPORT = "attack"


@recorded_outcome()
def attack(cfg: DictConfig) -> dict[str, Path]:
    """Run what the config asks for, print it, and return the files written by their names."""
    settings = checked(cfg)
    pl.seed_everything(settings["seed"], workers=True, verbose=False)
    victim = victim_of(cfg, settings)
    judge, features = judge_of(settings, victim)
    images = images_of(cfg, settings, victim)
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams({**plain(cfg), "trained": victim.trained})
    study = Study(settings, victim, images, features)
    attacks = study.run()
    print_attacks(f"{victim.name}, payload of {victim.releases.at}", attacks)
    report = described(victim, images, study, attacks, judge)
    files = write_report(Path(cfg.paths.output_dir), report, attacks, shown(study, attacks))
    for logger in loggers:
        log_attacks(logger, report, attacks, files)
    for file in files.values():
        say(f"Written: {file}")
    if victim.network is not None:
        next_command("export", {"ckpt_path": cfg.ckpt_path} | vouching(victim.trained))
    else:
        next_command("infer", {"bundle": cfg.bundle}, "input=…")
    return files


def described(victim: Victim, images: AttackImages, study: Study, attacks: list[Attack], judge: str) -> dict[str, Any]:
    """Return everything that is reported as plain values."""
    return {
        "schema": SCHEMA,
        "attacked": victim.name,
        "at": victim.releases.at,
        "draws": study.draws,
        "images": {
            "train": len(images.train),
            "val": len(images.val),
            "targets": len(images.targets),
            "left_out": images.left_out,
        },
        "features": judge,
        "mean_image_mse": study.mean_mse.mean().item(),
        "headlines": headlines(attacks),
        "attacks": [as_values(each) for each in attacks],
    }


def shown(study: Study, attacks: list[Attack]) -> dict[str, Tensor]:
    """Return the rows of the picture: originals, the best attacker of each number of releases, controls, families."""
    times = sorted({each.releases for each in attacks if each.role == ATTACKER})
    best = [strongest(attacks, each).title for each in times]
    names = dict.fromkeys(["original", *best, *study.pictures])
    return {name: study.pictures[name] for name in names}


def write_report(
    output: Path, report: dict[str, Any], attacks: list[Attack], pictures: dict[str, Tensor]
) -> dict[str, Path]:
    """Write the report as JSON and CSV, and the grid of originals and reconstructions."""
    output.mkdir(parents=True, exist_ok=True)
    contents = {f"{REPORT}.json": dump(report)}
    if len(pictures["original"]):
        contents[f"{REPORT}.png"] = grid(pictures)
    for name, content in contents.items():
        (output / name).write_bytes(content)
    write_csv(output / f"{REPORT}.csv", csv_rows(attacks))
    return {name: output / name for name in [*contents, f"{REPORT}.csv"]}


def log_attacks(logger: Any, report: dict[str, Any], attacks: list[Attack], files: dict[str, Path]) -> None:
    """Give a logger the headlines; W&B also gets the grid, the table and the files."""
    metrics = {"attack/mean_image_mse": report["mean_image_mse"]}
    for headline in report["headlines"]:
        end = "" if headline["releases"] == 1 else f"_of_{headline['releases']}_releases"
        metrics |= {f"attack/{name}{end}": headline[name]["value"] for name in ("mse", "explained")}
    logger.log_metrics(metrics)
    rows = csv_rows(attacks)
    log_report(logger, "attacks", list(rows[0]), [list(row.values()) for row in rows], files)


def main(cfg: DictConfig) -> None:
    """Attack a checkpoint or a bundle."""
    attack(cfg)
