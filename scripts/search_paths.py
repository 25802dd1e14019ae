"""Search for the path through two networks that is worth most: train the links of a few, predict the others."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("search_paths")

import shutil
import time
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from torch import nn

from cleave.architectures import Path
from cleave.datamodules import ImageDataModule
from cleave.lightning_modules import signals
from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.planning import (
    PathProblem,
    PathRecord,
    SearchFolder,
    SearchResult,
    candidate_paths,
    path_name,
    path_problem,
)
from cleave.reports.paths.report import print_search, write_search
from cleave.reports.paths.tables import Row, path_rows
from cleave.reports.terminal import console, hushed, number, say
from cleave.scripts.assembly.building import instantiate_each, plain
from cleave.scripts.assembly.given.resumed import run_of_another
from cleave.scripts.assembly.hints import next_command, vouching
from cleave.scripts.assembly.identity import identity
from cleave.scripts.assembly.idle import idle_of_search, say_what_is_idle
from cleave.scripts.assembly.linking.pairs import Pair, cut_pair, with_path
from cleave.scripts.assembly.linking.path_times import block_times, build_links, loads_of
from cleave.scripts.assembly.linking.searching import check, find, worth
from cleave.scripts.assembly.networks import keyed, plain_value
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.stopping import telling_where_it_goes_on
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.train import launches_processes, train

RUNS = "runs"


@recorded_outcome()
def search(cfg: DictConfig) -> SearchResult:
    """Search as the config says, write what was found, and return it."""
    if launches_processes(cfg):
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} would start the search once for each device; use trainer.devices=1 "
            "or trainer.strategy=ddp_spawn"
        )
    check(cfg)
    pair = cut_pair(cfg)
    problem, folder = described(cfg, pair)
    announce(cfg, pair, problem)
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams(plain(cfg))
    local, host = map(len, pair.names)
    result = find(cfg, problem, (local, host), trainer_of(cfg, problem, folder))
    rows = path_rows(problem, result)
    print_search(rows, result)
    files = write_search(
        folder.folder, rows, problem, result, "Reward" if cfg.search.cost is None else "Cost, negative"
    )
    for file in files.values():
        say(f"Written: {file}")
    for logger in loggers:
        log_search(logger, rows, result, files)
    say_what_follows(folder, result)
    return result


def described(cfg: DictConfig, pair: Pair) -> tuple[PathProblem, SearchFolder]:
    """Return what the search chooses from, and its folder.

    Raises:
        ValueError: A setting is out of range, no link fits a path, or the folder is another search's.
    """
    settings = cfg.search
    limits = {name: plain_value(settings[name]) for name in Path._fields}
    with keyed("search", settings):
        local, host = map(len, pair.names)
        paths = candidate_paths(local, host, **limits, cross=settings.cross, skips=settings.skips)
    links = build_links(pair, paths)
    with keyed("search", settings):
        folder = SearchFolder(settings.folder or cfg.paths.output_dir, identity(cfg, pair.data, ["search"]))
    times = block_times(settings, folder.folder, pair, links)
    original, loads = loads_of(pair, times, links, paths, settings.bytes_per_second)
    accuracy = accuracy_of(pair.network, pair.data, settings.device)
    shares = {name: settings[name] for name in ("local_share", "host_share")}
    by_reward = settings.cost is None
    with keyed("search", settings):
        return path_problem(original, accuracy, loads, worth(cfg, accuracy), **shares, above_original=by_reward), folder


def announce(cfg: DictConfig, pair: Pair, problem: PathProblem) -> None:
    """Say what is chosen from: the blocks by their numbers, and how many paths there are."""
    for owner, names in zip(("local", "host"), pair.names, strict=True):
        if names:
            say(f"Blocks, {owner}: {', '.join(f'{number} {name}' for number, name in enumerate(names))}")
    original, candidates = problem.original.throughput.total, len(problem.candidates())
    words = f"{len(problem.paths)} paths"
    if problem.above_original:
        words += f", {candidates} of them above the local network's {original:.4g} images per second"
    say(f"{words}; it answers {100 * problem.accuracy:.2f} % of the validation images rightly")
    # Those over a host first, where nearly every setting has an effect.
    say_what_is_idle(with_path(cfg, next(iter(problem.paths))))
    say_what_is_idle(cfg, idle_of_search)


@torch.inference_mode()
def accuracy_of(network: nn.Module, data: ImageDataModule, device: str) -> float:
    """Return the share of validation images that a network answers rightly."""
    network.to(device).eval()
    data.prepare_data()
    right, count = 0, 0
    for batch in data.eval_dataloader("val"):
        answers = network(data.input.normalize(batch["images"].to(device))).argmax(1).cpu()
        right += int((answers == batch["labels"]).sum())
        count += len(answers)
    return right / count


def checkpoint(folder: FilePath, path: Path) -> FilePath:
    """Return where the best weights of a path are."""
    return folder / RUNS / path_name(path) / "checkpoints" / "best.ckpt"


def trainer_of(cfg: DictConfig, problem: PathProblem, folder: SearchFolder) -> Callable[[Path], float]:
    """Return what trains a path, or looks its record up, and says what it came to."""
    known = folder.recorded(lambda path: train_path(cfg, path, folder.folder))

    def trained(path: Path) -> float:
        kept, begin = folder.find(path) is not None, time.perf_counter()
        if not kept:
            console.rule(f"path {path}")
        accuracy = known(path)
        how = "from its record" if kept else f"in {time.perf_counter() - begin:,.0f} seconds"
        value = number(problem.worth(path, accuracy))
        say(f"Path {path}: {100 * accuracy:.2f} % of the validation images, worth {value}, {how}")
        return accuracy

    return trained


def train_path(cfg: DictConfig, path: Path, folder: FilePath) -> PathRecord:
    """Train the links of a path as train.py does, and measure its best checkpoint.

    Raises:
        ValueError: The run kept no checkpoint.
    """
    own, file = with_path(cfg, path), checkpoint(folder, path)
    with open_dict(own):
        own.paths.output_dir, own.logger = str(file.parent.parent), None
    shutil.rmtree(file.parent, ignore_errors=True)  # of a training that did not finish
    begin = time.perf_counter()
    with hushed(), run_of_another(["search"], {"links.path": list(path)}):
        metrics = train(own)
    details: dict[str, Any] = {"seconds": time.perf_counter() - begin, "checkpoint": str(file.relative_to(folder))}
    if not file.exists():
        raise ValueError(f"{file} was not written; a search needs callbacks.checkpoint as it is by default")
    if "test/acc" in metrics:
        details["test_accuracy"] = metrics["test/acc"]
    restored = restore(file, trusted=True)
    data = instantiate(cfg.data)
    data.configure_input(restored.image_input)
    return PathRecord(path, accuracy_of(restored.network, data, cfg.search.device), details)


def log_search(logger: Any, rows: list[Row], result: SearchResult, files: dict[str, FilePath]) -> None:
    """Give a logger the worth of each trained path in order; W&B also gets the table, the plots and the file."""
    for order, one in enumerate(result.trained):
        logger.log_metrics({"search/accuracy": one.accuracy, "search/value": one.value}, step=order)
    best = {"search/best_accuracy": result.accuracy, "search/best_value": result.value}
    logger.log_metrics(best, step=len(result.trained))
    log_report(logger, "table", list(rows[0]), [list(row.values()) for row in rows], files)


def say_what_follows(folder: SearchFolder, result: SearchResult) -> None:
    """Print where the path that was found lies, and the commands that test and export it."""
    if result.path is None:
        return
    file = checkpoint(folder.folder, result.path)
    if not file.exists():
        record = folder.file(result.path)
        say(f"{file} is gone; delete {record} and run the search again in its folder to train it anew")
        return
    say(f"Checkpoint: {file}")
    settings = {"ckpt_path": file} | vouching(plain(restore(file, trusted=True).config))
    for name in ("evaluate", "export"):
        next_command(name, settings)


def main(cfg: DictConfig) -> float:
    """Search for a path, and return what it is worth, which a sweep shows."""
    folder = cfg.search.folder or cfg.paths.output_dir
    kept = telling_where_it_goes_on(folder, "Paths that were trained", "search_paths", "search.folder")
    with kept, recorded_outcome():
        return search(cfg).value


if __name__ == "__mp_main__":  # a rank of ddp_spawn
    quiet()
    signals.install()
