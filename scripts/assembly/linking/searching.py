"""What a search for a path may ask for, and the search itself by the strategy that the config names."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cleave.architectures import Path
from cleave.architectures.linking.described import USED
from cleave.architectures.naming import whole_number
from cleave.planning import (
    GaussianProcess,
    PathProblem,
    PathValue,
    SearchResult,
    SearchSettings,
    cost_value,
    exhaustive_search,
    printed_algorithm,
    random_search,
    reward_value,
    search_paths,
)
from cleave.scripts.assembly.networks import keyed, plain_value

PREDICTING = ("mended", "printed")
STRATEGIES = (*PREDICTING, "random", "exhaustive")
# Keys that put more on a path than its links: what that takes is in no block's time.
FURTHER = ("split.at", "exits.at", "exits.count", "inserts", "steps")


def check(cfg: DictConfig) -> None:
    """Refuse what a search cannot do, before anything is built.

    Raises:
        ValueError: The config asks for it; the message names the key.
    """
    _check_own(cfg.search)
    algorithm(cfg)
    worth(cfg, 1.0)
    if cfg.links.path is not None:
        path = plain_value(cfg.links.path)
        raise ValueError(
            f"links.path={path} is what is searched; set links.path=null where a preset says it, or use train.py"
        )
    if cfg.links.host != USED:
        raise ValueError(f"links.host={cfg.links.host} leaves the host out, and its time; use train.py")
    for key in FURTHER:
        if value := plain_value(OmegaConf.select(cfg, key)):
            raise ValueError(f"{key}={value} is of one path; leave it out, or train the path that is found by train.py")
    if cfg.ckpt_path is not None or not cfg.train or cfg.export:
        raise ValueError(
            "ckpt_path, train=false and export=true are options of train.py: a search goes on by search.folder=DIR, "
            "and export.py takes the checkpoint that it found"
        )
    if OmegaConf.select(cfg, "callbacks.checkpoint") is None:
        raise ValueError("callbacks.checkpoint=null keeps no weights, but a search measures the best; leave it out")


def _check_own(settings: DictConfig) -> None:
    if settings.strategy not in STRATEGIES:
        raise ValueError(f"search.strategy must be one of {', '.join(STRATEGIES)}, got {settings.strategy!r}")
    if settings.strategy in PREDICTING and importlib.util.find_spec("sklearn") is None:
        raise ValueError(
            f"search.strategy={settings.strategy} predicts accuracies by scikit-learn, which is not installed: "
            "pip install scikit-learn, the extra `search`, or take search.strategy=random or exhaustive"
        )
    if (settings.strategy == "random") != (settings.count is not None):
        raise ValueError(
            f"search.count={settings.count} does not fit search.strategy={settings.strategy}: only a random search has "
            "it, and needs it"
        )
    for name in ("count", "rounds", "batch_size"):
        if settings[name] is not None:
            whole_number(f"search.{name}", settings[name])
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's word for no driver, no such device, no CUDA
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"search.device={settings.device} cannot be used: {first}; leave it out for the CPU"
        ) from error
    speed = settings.bytes_per_second
    if speed is not None and settings.cost is None:
        raise ValueError(
            f"search.bytes_per_second={speed} would change nothing: the reward of 2024 knows no time on the wire; set "
            "search.cost, or leave it out"
        )
    if speed is not None and not (isinstance(speed, int | float) and math.isfinite(speed) and speed > 0):
        raise ValueError(f"search.bytes_per_second must be a number above 0, got {speed!r}")


def algorithm(cfg: DictConfig) -> SearchSettings:
    """Return how Algorithm 1 runs.

    Raises:
        ValueError: A number is out of range.
    """
    found: SearchSettings = _built(cfg.search.algorithm, "search.algorithm")
    return found


def worth(cfg: DictConfig, original: float) -> PathValue:
    """Return what makes paths worth their reward of 2024, or the less the larger their cost of 2023 is.

    Args:
        cfg: The config of a search.
        original: Accuracy of the local network.

    Raises:
        ValueError: A number is out of range.
    """
    if cfg.search.cost is not None:
        return cost_value(_built(cfg.search.cost, "search.cost"))
    return reward_value(_built(cfg.search.reward, "search.reward"), original)


def _built(cfg: DictConfig, key: str) -> Any:
    """Instantiate a group, what is inside first, so that a mistake names its own key."""
    for name, value in cfg.items():
        if OmegaConf.is_dict(value) and "_target_" in value:
            _built(value, f"{key}.{name!s}")
    with keyed(key, cfg):
        return instantiate(cfg)


def find(
    cfg: DictConfig, problem: PathProblem, blocks: tuple[int, int], trained: Callable[[Path], float]
) -> SearchResult:
    """Search by the strategy that the config names.

    Args:
        cfg: The config of a search.
        problem: What to choose from.
        blocks: Numbers of the local network's blocks and of the host's.
        trained: Trains a path and returns its accuracy.
    """
    settings, strategy = algorithm(cfg), cfg.search.strategy
    if strategy == "exhaustive":
        return exhaustive_search(problem, trained)
    if strategy == "random":
        return random_search(problem, trained, cfg.search.count, settings.seed)
    search: Any = search_paths if strategy == "mended" else printed_algorithm
    found: SearchResult = search(problem, trained, GaussianProcess(*blocks), settings)
    return found
