"""Membership inference: how well a network's answers tell the images that it was trained on from others."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("membership_inference")

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from cleave.deployment.bundle.canonical_json import dump
from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.reports.attacks.membership import FALSE_POSITIVES, Membership, as_row
from cleave.reports.terminal import say, table
from cleave.reports.written import write_files
from cleave.scripts.assembly.building import instantiate_each, plain
from cleave.scripts.assembly.leaks.members import Party, attacks_of, checked, party_of

SCHEMA = 1
REPORT = "membership_inference"
_FEW = math.ceil(1 / FALSE_POSITIVES)


@recorded_outcome()
def membership_inference(cfg: DictConfig) -> dict[str, Path]:
    """Run what the config asks for, print it, and return the files written by their names."""
    settings = checked(cfg)
    pl.seed_everything(settings["seed"], workers=True, verbose=False)
    party = party_of(cfg, settings)
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams({**plain(cfg), "trained": party.config})
    found, accuracies = attacks_of(party, settings)
    print_memberships(str(cfg.ckpt_path), party, found, accuracies)
    report = {
        "schema": SCHEMA,
        "attacked": str(cfg.ckpt_path),
        "members": len(party.members.images),
        "non_members": len(party.others.images),
        "source": party.source,
        "references": settings["references"],
        "accuracy": {"members": accuracies[0], "non_members": accuracies[1]},
        "dp": party.private,
        "attacks": [dataclasses.asdict(each) for each in found],
    }
    contents = {f"{REPORT}.json": dump(report)}
    files = write_files(Path(cfg.paths.output_dir), contents, f"{REPORT}.csv", [as_row(each) for each in found])
    for file in files.values():
        say(f"Written: {file}")
    for logger in loggers:
        best = max(found, key=lambda each: each.auc.value)
        logger.log_metrics({"membership/auc": best.auc.value, "membership/tpr": max(e.tpr.value for e in found)})
        rows = [as_row(each) for each in found]
        log_report(logger, "membership", list(rows[0]), [list(row.values()) for row in rows], files)
    return files


def print_memberships(name: str, party: Party, found: list[Membership], accuracies: tuple[float, float]) -> None:
    """Print all attacks, and what they are to be read beside."""
    rows = [
        (each.name, _words(each.auc, 1, 3), _words(each.tpr, 100, 1))
        for each in sorted(found, key=lambda each: -each.auc.value)
    ]
    title = f"{name}: {len(party.members.images):,} members, {len(party.others.images):,} others ({party.source})"
    table(title, rows, ("attack", "AUC", f"true positives at {100 * FALSE_POSITIVES:g} % false ones (%)"))
    say(
        f"A guess has AUC 0.5 and finds {100 * FALSE_POSITIVES:g} %. Accuracy on members {100 * accuracies[0]:.1f} %, "
        f"on others {100 * accuracies[1]:.1f} %"
    )
    if len(party.others.images) < _FEW:
        say(f"Of fewer than {_FEW} others 1 % is none: the true positives are those above every other")
    if party.source == "test":
        say("Others are test images; where these differ from training images in kind, an attack looks stronger")
    if party.private is not None:
        epsilon, delta = party.private["epsilon"], party.private["delta"]
        most = min(1.0, math.exp(min(epsilon, 50.0)) * FALSE_POSITIVES + delta)
        say(f"DP-SGD of ε = {epsilon:.3g} and δ = {delta:g} allows at most {100 * most:.1f} % true positives there")


def _words(found: Any, factor: float, digits: int) -> str:
    value, low, high = (f"{factor * each:.{digits}f}" for each in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def main(cfg: DictConfig) -> None:
    """Ask a checkpoint who was in its training."""
    membership_inference(cfg)
