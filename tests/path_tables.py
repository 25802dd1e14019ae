"""Pairs of networks whose paths' accuracies are known beforehand: smooth surfaces with noise, from a seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cleave.architectures.linking.path import Path
from cleave.planning import (
    BlockTimes,
    PathLoad,
    PathProblem,
    PathReward,
    candidate_paths,
    path_loads,
    path_problem,
    reward_value,
)

BLOCKS, ORIGINAL = 6, 0.867


class Pair(NamedTuple):
    """A search's problem, and the accuracy of every path in it."""

    problem: PathProblem
    accuracies: dict[Path, float]


def pair(seed: int, noise: float = 0.004) -> Pair:
    """Return a pair of six blocks each, of paths [0, 1, hout, lin] as the papers try them.

    Accuracy falls with each local block that is left out, and with each block by which the host is left too early or
    too late: its first features are too general, its last ones those of its own classes.
    """
    generator = np.random.default_rng(seed)
    local = generator.uniform(0.7, 1.3, BLOCKS)
    host = generator.uniform(0.5, 1.5, BLOCKS) * generator.uniform(0.2, 0.5)
    times = BlockTimes(
        {f"block{i}": float(s) for i, s in enumerate(0.95 * local / local.sum())},
        output=0.05,
        host={f"layer{i}": float(s) for i, s in enumerate(host)},
        links=0.05,
    )
    paths = candidate_paths(BLOCKS, BLOCKS, lout=[0], hin=[1], skips=False)
    fall, bend, best = generator.uniform(0.005, 0.03), generator.uniform(0.02, 0.12), generator.uniform(2.0, 4.5)
    accuracies = {
        path: float(
            ORIGINAL - 0.01 - fall * (path.lin - 1) - bend * ((path.hout - best) / 4) ** 2
            + noise * generator.standard_normal()
        )
        for path in paths
    }  # fmt: skip
    value = reward_value(PathReward(), ORIGINAL)
    return Pair(path_problem(PathLoad(times.original), ORIGINAL, path_loads(times, paths), value), accuracies)
