"""What a search chooses from: a local network, paths that may help it, and what each is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cleave.architectures.linking.path import Path
from cleave.planning.paths.rewards import PathCost, PathLoad, PathReward, check_fraction
from cleave.planning.paths.throughput import Throughput, original_throughput, path_throughput
from cleave.planning.paths.times import BlockTimes


@dataclass(frozen=True)
class PathOption:
    """What is known of a path, or of the local network alone, before anything is trained.

    Attributes:
        throughput: What it does per second.
        load: What it asks of both sides.
    """

    throughput: Throughput
    load: PathLoad


PathValue = Callable[[PathOption, float], float]
"""From an option and its accuracy, a fraction, to its worth: of two, the larger one is better."""


@dataclass(frozen=True)
class PathProblem:
    """A local network, the paths that may help it, and what they are worth.

    Args:
        original: The local network as it is.
        accuracy: Its accuracy A_0, a fraction.
        paths: The paths to choose from.
        value: The worth of an option with an accuracy.
        above_original: Leave out the paths that do not raise the throughput, as Algorithm 1 does.

    Raises:
        ValueError: The accuracy is no fraction.
    """

    original: PathOption
    accuracy: float
    paths: Mapping[Path, PathOption]
    value: PathValue
    above_original: bool = True

    def __post_init__(self) -> None:
        check_fraction("the local network's accuracy", self.accuracy)

    @property
    def original_value(self) -> float:
        """What the local network is worth as it is."""
        return self.value(self.original, self.accuracy)

    def candidates(self) -> list[Path]:
        """Return the paths that a search may train."""
        return [path for path, option in self.paths.items() if not self.above_original or option.throughput.gains]

    def worth(self, path: Path, accuracy: float) -> float:
        """Return what a path is worth with an accuracy.

        Raises:
            ValueError: It is no number.
        """
        worth = self.value(self.paths[path], accuracy)
        if not math.isfinite(worth):
            raise ValueError(f"the path {path} with an accuracy of {accuracy:g} is worth {worth}; value must be finite")
        return worth


def reward_value(reward: PathReward, original: float) -> PathValue:
    """Make paths worth their reward of 2024.

    Args:
        reward: The reward.
        original: A_0: accuracy of the local network.
    """
    return lambda option, accuracy: reward(option.throughput, original, accuracy)


def cost_value(cost: PathCost) -> PathValue:
    """Make paths worth the less, the larger their cost of 2023 is."""
    return lambda option, accuracy: -cost(option.load, accuracy)


def path_loads(times: BlockTimes, paths: Collection[Path]) -> dict[Path, PathLoad]:
    """Return what each path asks of both sides by the times of its blocks and links.

    Args:
        times: Seconds of blocks and links.
        paths: The paths.

    Raises:
        ValueError: A path leads outside the blocks, or a link has no time.
    """
    return {path: PathLoad(*times.path(path)) for path in paths}


def path_problem(
    original: PathLoad,
    accuracy: float,
    loads: Mapping[Path, PathLoad],
    value: PathValue,
    *,
    local_share: float = 1.0,
    host_share: float = 1.0,
    above_original: bool = True,
) -> PathProblem:
    """Make a problem of what the local network and the paths ask of both sides.

    Args:
        original: What the local network asks alone.
        accuracy: Its accuracy A_0, a fraction.
        loads: What each path asks.
        value: The worth of an option with an accuracy.
        local_share: ρ: largest share of the local side's time that a path may have.
        host_share: φ: share of the host's time that is left to guests.
        above_original: Leave out the paths that do not raise the throughput.

    Raises:
        ValueError: The accuracy is no fraction, a share is not within 0 to 1, or the local network or a path takes no
            time.
    """
    options = {}
    for path, load in loads.items():
        seconds = original.local_seconds, load.local_seconds, load.host_seconds
        options[path] = PathOption(path_throughput(*seconds, local_share=local_share, host_share=host_share), load)
    own = PathOption(original_throughput(original.local_seconds), original)
    return PathProblem(own, accuracy, options, value, above_original)
