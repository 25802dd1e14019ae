"""Attribute inference: how well an adversary tells, from the decoded bytes, what the task has no use for."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("attribute_inference")

from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from cleave.deployment.bundle.canonical_json import dump
from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.reports.attacks.attributes import as_values, best, csv_rows, print_inferences
from cleave.reports.terminal import say
from cleave.reports.written import write_files
from cleave.scripts.assembly.attacking.victim import victim_of
from cleave.scripts.assembly.building import instantiate_each, plain
from cleave.scripts.assembly.leaks.attributes import checked, inferred, labelled_images

SCHEMA = 1
REPORT = "attribute_inference"


@recorded_outcome()
def attribute_inference(cfg: DictConfig) -> dict[str, Path]:
    """Run what the config asks for, print it, and return the files written by their names."""
    settings = checked(cfg)
    pl.seed_everything(settings["seed"], workers=True, verbose=False)
    victim = victim_of(cfg, settings)
    images = labelled_images(cfg, settings, victim)
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams({**plain(cfg), "trained": victim.trained})
    found = inferred(settings, victim, images)
    words = ", ".join(images.names[:4]) + (", …" if len(images.names) > 4 else "")
    print_inferences(f"{victim.name}, payload of {victim.releases.at}: which of {words}", found)
    report = {
        "schema": SCHEMA,
        "attacked": victim.name,
        "at": victim.releases.at,
        "attributes": list(images.names),
        "images": {"train": len(images.train.images), "val": len(images.val.images)}
        | {"targets": len(images.targets.images), "left_out": images.left_out},
        "headline": as_values(best(found)),
        "majority": as_values(best(found, "majority")),
        "attacks": [as_values(each) for each in found],
    }
    contents = {f"{REPORT}.json": dump(report)}
    files = write_files(Path(cfg.paths.output_dir), contents, f"{REPORT}.csv", csv_rows(found))
    for file in files.values():
        say(f"Written: {file}")
    for logger in loggers:
        accuracy = {"attribute/accuracy": best(found).accuracy.value}
        logger.log_metrics(accuracy | {"attribute/majority": best(found, "majority").accuracy.value})
        rows = csv_rows(found)
        log_report(logger, "attributes", list(rows[0]), [list(row.values()) for row in rows], files)
    return files


def main(cfg: DictConfig) -> None:
    """Infer an attribute behind a checkpoint or a bundle."""
    attribute_inference(cfg)
