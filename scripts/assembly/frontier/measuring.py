"""One point of a frontier: trained as ``train.py`` does it, tested, and attacked as ``attack.py`` does it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, open_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from cleave.lightning_modules.attacking.releases import NetworkReleases
from cleave.reports.attacks.metrics import Interval
from cleave.reports.attacks.results import strongest
from cleave.reports.frontier.points import FrontierPoint
from cleave.reports.rates.results import RESULTS, Point, read_results
from cleave.reports.terminal import hushed
from cleave.scripts.assembly.attacking.carried_out import CarriedOut, carried_out, prepared, write_report
from cleave.scripts.assembly.attacking.images import images_of
from cleave.scripts.assembly.attacking.settings import checked
from cleave.scripts.assembly.attacking.victim import Victim
from cleave.scripts.assembly.frontier.folder import FrontierFolder
from cleave.scripts.assembly.frontier.grid import OWN, GridPoint, attack_config, attack_keys, run_config
from cleave.scripts.assembly.given.resumed import run_of_another
from cleave.scripts.assembly.starting.terminal import is_users_mistake, unwrapped
from cleave.scripts.train import planned_run, train

ATTACK, PICTURES = "attack", "pictures.safetensors"


def rehearse(cfg: DictConfig, points: list[GridPoint]) -> Victim:
    """Build the run of each point, so that what cannot be is named before the first is trained.

    Returns:
        What would be attacked at the first point, untrained.

    Raises:
        ValueError: A run cannot be built; the message names the point.
    """
    victims: list[Victim] = []
    for point in points:
        own = run_config(cfg, point.settings)
        with open_dict(own):
            own.logger = None
        try:
            with hushed():
                parts = planned_run(own, None)[0]
                releases = NetworkReleases(parts.network, parts.data.input)
        except Exception as error:
            if not is_users_mistake(error):
                raise
            raise ValueError(f"{point.place.words()}: {unwrapped(error)}") from error
        if not victims:
            victims.append(Victim(point.name, releases, None, parts.data.input, parts.data, {}))
    return victims[0]


def check_attack(cfg: DictConfig, victim: Victim) -> None:
    """Refuse an attack that could not be carried out once a point is trained.

    Raises:
        ValueError: A setting is out of range, or targets have been seen.
    """
    own = attack_config(cfg, "")
    settings = checked(own)
    with hushed():
        images_of(own, settings, victim)


def measure(cfg: DictConfig, point: GridPoint, folder: FrontierFolder) -> FrontierPoint:
    """Train a point, test it and attack it; a training that was interrupted goes on from its last checkpoint.

    Raises:
        ValueError: The run kept no checkpoint, or did not measure what points are chosen by.
    """
    begin, run = time.perf_counter(), folder.run(point)
    with hushed():
        metrics = _trained(cfg, point, run)
        file = run / "checkpoints" / "best.ckpt"
        files = sorted(run.glob("checkpoints/**/best.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        if files:  # of a recipe, its last step's
            file = files[-1]
        if not file.exists():
            raise ValueError(f"{file} was not written; a frontier needs callbacks.checkpoint as it is by default")
        if cfg.optimized_metric not in metrics:
            raise ValueError(
                f"optimized_metric={cfg.optimized_metric} was not measured, and points are chosen by it; measured were "
                f"{', '.join(sorted(metrics))}"
            )
        tested = _tested(run / RESULTS, point)
        own = attack_config(cfg, file)
        settings = checked(own)
        pl.seed_everything(settings["seed"], workers=True, verbose=False)
        found = carried_out(settings, prepared(own, settings))
    write_report(run / ATTACK, found)
    _keep_pictures(run, found)
    details = {"seconds": time.perf_counter() - begin, "checkpoint": str(file.relative_to(folder.folder))}
    return _summary(point, metrics[cfg.optimized_metric], tested, found, details)


def pictures_of(run: Path) -> dict[str, Tensor] | None:
    """Return originals and what the strongest attacker of a point rebuilt of them, from 0 to 1, if they were kept."""
    file = run / ATTACK / PICTURES
    return {name: images.float() / 255 for name, images in load_file(file).items()} if file.exists() else None


def _trained(cfg: DictConfig, point: GridPoint, run: Path) -> dict[str, Any]:
    own = run_config(cfg, point.settings)
    saved = sorted(run.glob("checkpoints/**/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if not saved:
        shutil.rmtree(run, ignore_errors=True)  # of a training that did not come far
    with open_dict(own):
        own.paths.output_dir, own.logger = str(run), None
        own.ckpt_path = str(saved[-1]) if saved else None
    with run_of_another([*OWN, *attack_keys(), "data@attack.data", "ckpt_path"], point.settings):
        return train(own)


def _tested(file: Path, point: GridPoint) -> Point:
    """Return what the test of a run came to, at the width that is set where it knows several."""
    tested = [Point.from_dict(values, where) for where, values in read_results(file)]
    return next((each for each in tested if each.bits == point.place.bits), tested[-1])


def _keep_pictures(run: Path, found: CarriedOut) -> None:
    best = strongest(found.attacks).title
    rows = {"original": found.pictures["original"], "rebuilt": found.pictures[best]}
    save_file(
        {name: (255 * images).round().to(torch.uint8).contiguous() for name, images in rows.items()},
        run / ATTACK / PICTURES,
    )


def _summary(
    point: GridPoint, validation: float, tested: Point, found: CarriedOut, details: dict[str, Any]
) -> FrontierPoint:
    best = strongest(found.attacks)
    correlation = found.report["information"]["distance_correlation"] or {}
    ssim: Interval | None = best.figures.get("ssim")
    return FrontierPoint(
        place=point.place,
        validation=validation,
        accuracy=tested.accuracy,
        payload_bytes=tested.payload_bytes,
        device_macs=tested.encoder_macs,
        device_params=tested.encoder_params,
        attack=best.title,
        mse=best.figures["mse"],
        explained=best.figures["explained"],
        ssim=ssim,
        distance_correlation=correlation.get("value"),
        distance_correlation_spread=correlation.get("spread"),
        details={**details, "headlines": found.report["headlines"], "information": found.report["information"]},
    )
