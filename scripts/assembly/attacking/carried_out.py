"""An attack from its config to what it came to, and the files that say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from cleave.deployment.bundle.canonical_json import dump
from cleave.reports.attacks.information import Information
from cleave.reports.attacks.pictures import grid
from cleave.reports.attacks.results import ATTACKER, Attack, as_values, headlines, strongest
from cleave.reports.attacks.tables import csv_rows
from cleave.reports.written import write_files
from cleave.scripts.assembly.attacking.images import AttackImages, images_of
from cleave.scripts.assembly.attacking.information import information_of
from cleave.scripts.assembly.attacking.study import Study
from cleave.scripts.assembly.attacking.victim import Victim, judge_of, victim_of

SCHEMA = 1
REPORT = "attack"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is attacked, with which images, and by what these are compared.

    Attributes:
        victim: What is attacked.
        images: The adversary's images and the targets.
        judge: What compares images, in words.
        features: Maps images from 0 to 1 to the features that are compared.
    """

    victim: Victim
    images: AttackImages
    judge: str
    features: Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class CarriedOut:
    """What an attack came to.

    Attributes:
        attacks: All attackers and controls.
        information: Bounds on what a payload says of its image.
        report: All that is reported, as JSON can hold it.
        pictures: Some targets by what rebuilt them, the originals first.
    """

    attacks: list[Attack]
    information: Information
    report: dict[str, Any]
    pictures: dict[str, Tensor]


def prepared(cfg: DictConfig, settings: dict[str, Any]) -> Prepared:
    """Load what a config attacks, and the images.

    Args:
        cfg: The config of an attack.
        settings: As :func:`~cleave.scripts.assembly.attacking.settings.checked` returns them.
    """
    victim = victim_of(cfg, settings)
    judge, features = judge_of(settings, victim)
    return Prepared(victim, images_of(cfg, settings, victim), judge, features)


def carried_out(settings: dict[str, Any], given: Prepared) -> CarriedOut:
    """Run all attackers and controls, and measure bounds on information."""
    study = Study(settings, given.victim, given.images, given.features)
    attacks = study.run()
    information = information_of(settings, given.victim, given.images, study.draws)
    report = {**_described(given, study, attacks), "information": information.as_values()}
    return CarriedOut(attacks, information, report, _shown(study, attacks))


def write_report(output: Path, found: CarriedOut) -> dict[str, Path]:
    """Write the report as JSON and CSV, and the grid of originals and reconstructions."""
    contents = {f"{REPORT}.json": dump(found.report)}
    if len(found.pictures["original"]):
        contents[f"{REPORT}.png"] = grid(found.pictures)
    return write_files(output, contents, f"{REPORT}.csv", csv_rows(found.attacks))


def _described(given: Prepared, study: Study, attacks: list[Attack]) -> dict[str, Any]:
    """Return everything that is reported as plain values."""
    images = given.images
    return {
        "schema": SCHEMA,
        "attacked": given.victim.name,
        "at": given.victim.releases.at,
        "draws": study.draws,
        "images": {
            "train": len(images.train),
            "val": len(images.val),
            "targets": len(images.targets),
            "left_out": images.left_out,
        },
        "features": given.judge,
        "mean_image_mse": study.mean_mse.mean().item(),
        "headlines": headlines(attacks),
        "attacks": [as_values(each) for each in attacks],
    }


def _shown(study: Study, attacks: list[Attack]) -> dict[str, Tensor]:
    """Return the rows of the picture: originals, the best attacker of each number of releases, controls, families."""
    times = sorted({each.releases for each in attacks if each.role == ATTACKER})
    best = [strongest(attacks, each).title for each in times]
    names = dict.fromkeys(["original", *best, *study.pictures])
    return {name: study.pictures[name] for name in names}
