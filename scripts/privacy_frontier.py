"""Find what privacy costs: train, test and attack a network at every point of a grid, and go on where it stopped."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("privacy_frontier")

import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cleave.architectures.linking.described import is_linked
from cleave.deployment.bundle.canonical_json import dump
from cleave.lightning_modules import signals
from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.reports.attacks.pictures import grid
from cleave.reports.frontier.plots import frontier_plot
from cleave.reports.frontier.points import FrontierPoint, reaching, weakest_reaching
from cleave.reports.frontier.tables import as_report, frontier_rows, print_frontier, print_wanted
from cleave.reports.terminal import console, say, say_next
from cleave.reports.written import write_files
from cleave.scripts.assembly.attacking.settings import checked
from cleave.scripts.assembly.building import instantiate_each, plain
from cleave.scripts.assembly.frontier.folder import FrontierFolder, shared
from cleave.scripts.assembly.frontier.grid import (
    GridPoint,
    attack_config,
    grid_points,
    run_config,
    smaller_hides_more,
    strength_word,
)
from cleave.scripts.assembly.frontier.measuring import check_attack, measure, pictures_of, rehearse
from cleave.scripts.assembly.hints import next_command, vouching
from cleave.scripts.assembly.idle import say_what_is_idle
from cleave.scripts.assembly.networks import keyed
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.stopping import going_on, telling_where_it_goes_on
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.train import launches_processes

REPORT, PICTURES = "frontier", "pictures"


@recorded_outcome()
def frontier(cfg: DictConfig) -> FrontierPoint | None:
    """Measure all points, write what was found, and return the one that reaches the wanted MSE, if one is wanted."""
    check(cfg)
    points = grid_points(cfg)
    victim = rehearse(cfg, points)
    check_attack(cfg, victim)
    with keyed("frontier", cfg.frontier):
        folder = FrontierFolder(cfg.frontier.folder or cfg.paths.output_dir, shared(cfg, points, victim))
    say(f"{len(points)} points, {sum(folder.find(point) is not None for point in points)} of them have a record")
    say_what_is_idle(run_config(cfg, points[0].settings))
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams(plain(cfg))
    found = [measured(cfg, point, folder) for point in points]
    word, wanted = strength_word(cfg), cfg.wanted.mse
    print_frontier(found, word)
    best = None if wanted is None else reaching(found, wanted)
    weakest = {} if wanted is None else weakest_reaching(found, wanted, smaller_hides_more(cfg))
    if wanted is not None:
        print_wanted(found, wanted, best, weakest, word)
    report = as_report(found, cfg.frontier.strength.key, wanted, best, weakest)
    files = write_frontier(folder, points, found, report, word)
    for file in files.values():
        say(f"Written: {file}")
    for logger in loggers:
        log_frontier(logger, found, best, files)
    say_what_follows(cfg, folder, best)
    return best


def check(cfg: DictConfig) -> None:
    """Refuse what a frontier cannot do, before anything is built.

    Raises:
        ValueError: The config asks for it; the message names the key.
    """
    if launches_processes(cfg):
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} would start the frontier once for each device; use "
            "trainer.devices=1 or trainer.strategy=ddp_spawn"
        )
    if cfg.ckpt_path is not None or not cfg.train or not cfg.test or cfg.export:
        raise ValueError(
            "ckpt_path, train=false, test=false and export=true are options of train.py: a frontier trains and tests "
            "every point, goes on by frontier.folder=DIR, and export.py takes a checkpoint that it found"
        )
    if OmegaConf.select(cfg, "callbacks.checkpoint") is None:
        raise ValueError("callbacks.checkpoint=null keeps no weights, but a frontier attacks the best; leave it out")
    if is_linked(cfg):
        raise ValueError(
            f"links.path={cfg.links.path}: only a split network is attacked from its checkpoint; leave it out, and "
            "attack a path by attack.py bundle=DIR"
        )
    wanted = cfg.wanted.mse
    if wanted is not None and not (
        isinstance(wanted, int | float) and not isinstance(wanted, bool) and 0 < wanted < math.inf
    ):
        raise ValueError(f"wanted.mse must be a number above 0, of images from 0 to 1, such as 0.02, got {wanted!r}")
    checked(attack_config(cfg, ""))


def measured(cfg: DictConfig, point: GridPoint, folder: FrontierFolder) -> FrontierPoint:
    """Measure a point, or look its record up, and say what it came to."""
    found, word = folder.find(point), strength_word(cfg)
    how = "from its record"
    if found is None:
        console.rule(f"point {point.place.words(word)}")
        found = measure(cfg, point, folder)
        folder.write(point, found)
        how = f"in {found.details['seconds']:,.0f} seconds"
    say(
        f"{point.place.words(word)}: {100 * found.accuracy:.2f} % of the test images, lowest MSE "
        f"{found.mse.value:.4g}, explained {found.explained.value:.3f}, {how}"
    )
    return found


def write_frontier(
    folder: FrontierFolder,
    points: list[GridPoint],
    found: list[FrontierPoint],
    report: dict[str, Any],
    word: str | None,
) -> dict[str, Path]:
    """Write the report as JSON and CSV, the plot, and the grid of originals and reconstructions."""
    contents = {f"{REPORT}.json": dump(report)}
    contents[f"{REPORT}.png"] = frontier_plot(found, word, report["wanted_mse"])
    rows: dict[str, Tensor] = {}
    for point, one in zip(points, found, strict=True):
        kept = pictures_of(folder.run(point))
        if kept is not None and len(kept["original"]):
            rows.setdefault("original", kept["original"])
            rows[f"{one.place.words(word)}: {one.mse.value:.3g}"] = kept["rebuilt"][: len(rows["original"])]
    if rows:
        contents[f"{PICTURES}.png"] = grid(rows)
    return write_files(folder.folder, contents, f"{REPORT}.csv", frontier_rows(found))


def log_frontier(logger: Any, found: list[FrontierPoint], best: FrontierPoint | None, files: dict[str, Path]) -> None:
    """Give a logger the figures of each point in order; W&B also gets the table, the pictures and the files."""
    for order, one in enumerate(found):
        figures = {"accuracy": one.accuracy, "mse": one.mse.value, "explained": one.explained.value}
        logger.log_metrics({f"frontier/{name}": value for name, value in figures.items()}, step=order)
    if best is not None:
        chosen = {"frontier/best_accuracy": best.accuracy, "frontier/best_mse": best.mse.value}
        logger.log_metrics(chosen, step=len(found))
    rows = frontier_rows(found)
    log_report(logger, "points", list(rows[0]), [list(row.values()) for row in rows], files)


def say_what_follows(cfg: DictConfig, folder: FrontierFolder, best: FrontierPoint | None) -> None:
    """Print where the point that was found lies and the command that exports it; else the one that asks for a point."""
    if best is None and cfg.wanted.mse is not None:
        say("Give a stronger defence, such as more frontier.strength.values, and run it again in its folder")
        return
    if best is None:
        say_next(f"{going_on(str(folder.folder), 'privacy_frontier', 'frontier.folder')} wanted.mse=…")
        return
    file = folder.folder / best.details["checkpoint"]
    if not file.exists():
        say(f"{file} is gone; delete the point's record in {folder.folder / folder.records_folder} to train it anew")
        return
    say(f"Checkpoint: {file}")
    next_command("export", {"ckpt_path": file} | vouching(plain(restore(file, trusted=True).config)))


def main(cfg: DictConfig) -> float | None:
    """Measure a frontier, and return the accuracy of the point that reaches the wanted MSE, which a sweep shows."""
    folder = cfg.frontier.folder or cfg.paths.output_dir
    kept = telling_where_it_goes_on(folder, "Points that were measured", "privacy_frontier", "frontier.folder")
    with kept, recorded_outcome():
        best = frontier(cfg)
        return None if best is None else best.accuracy


if __name__ == "__mp_main__":  # a rank of ddp_spawn
    quiet()
    signals.install()
