"""The search for the path that is worth most where few can be trained: Algorithm 1 of 2024, random, exhaustive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cleave.architectures.linking.path import Path
from cleave.architectures.naming import whole_number
from cleave.planning.paths.prediction import Predictor
from cleave.planning.paths.problem import PathOption, PathProblem
from cleave.planning.paths.rewards import check_fraction

Train = Callable[[Path], float]
"""Trains the links of a path and returns its accuracy, a fraction."""
ALL = "every path to choose from was trained"


@dataclass(frozen=True)
class TrainedPath:
    """A path that was trained.

    Attributes:
        path: The path.
        accuracy: What it reached.
        value: What it is worth.
        stage: The stage that chose it; 0 is the first set.
        predicted: The accuracy that was predicted; ``None`` where it was not chosen by one.
    """

    path: Path
    accuracy: float
    value: float
    stage: int
    predicted: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        path: The path to take; ``None`` keeps the local network as it is.
        option: What it does and asks.
        accuracy: Its accuracy.
        value: What it is worth.
        trained: All that were trained, in order.
        reason: Why the search ended, in a sentence.
    """

    path: Path | None
    option: PathOption
    accuracy: float
    value: float
    trained: tuple[TrainedPath, ...]
    reason: str


@dataclass(frozen=True)
class SearchSettings:
    """How Algorithm 1 runs. The paper gives c_stop and ε; what its first set P⁰ and its input k are is our choice.

    Args:
        start: Paths of the first set P⁰, drawn at random from the candidates.
        each: k: paths that a stage trains.
        stop_after: c_stop: stages in a row without a gain after which it stops.
        least_gain: ε: a stage that adds less to the worth has no gain.
        most: Most paths to train in all; ``None``: no limit.
        exploration: Standard deviations that are added to a predicted accuracy; the paper adds none.
        seed: Of the first set.

    Raises:
        ValueError: A number is out of range.
    """

    start: int = 2
    each: int = 1
    stop_after: int = 3
    least_gain: float = 0.01
    most: int | None = None
    exploration: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "each", "stop_after"):
            whole_number(name, getattr(self, name))
        whole_number("seed", self.seed, least=0)
        if self.most is not None:
            whole_number("most", self.most)
        for name in ("least_gain", "exploration"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


DEFAULT = SearchSettings()


def search_paths(
    problem: PathProblem, train: Train, predict: Predictor, settings: SearchSettings = DEFAULT
) -> SearchResult:
    """Search by Algorithm 1 of "Edge AI as a Service with Coordinated Deep Neural Networks" (2024), corrected.

    A first set of paths is trained. Then each stage predicts the accuracy of all others from those trained, and trains
    the paths of the best predicted worth, until so many stages in a row have added too little to the best worth.
    Unlike the algorithm as printed (:func:`printed_algorithm`), a trained path is never chosen again; the gain is that
    of the best path so far; and the best one *measured* is returned, which may be the local network as it is.

    Args:
        problem: What to choose from.
        train: Trains a path.
        predict: Predicts accuracies.
        settings: How it runs.

    Raises:
        ValueError: ``train`` returns no accuracy.
    """
    remaining = problem.candidates()
    if not remaining:
        return _kept(problem)
    limit = min(settings.most or len(remaining), len(remaining))
    trained = [_train(problem, train, path, 0) for path in _first(remaining, settings)[:limit]]
    best, idle, stage = _best(problem, trained), 0, 0
    while len(trained) < limit and idle < settings.stop_after:
        stage += 1
        done = {one.path for one in trained}
        remaining = [path for path in remaining if path not in done]
        ranked = _ranked(problem, trained, remaining, predict, settings.exploration)
        for path, predicted in ranked[: min(settings.each, limit - len(trained))]:
            trained.append(_train(problem, train, path, stage, predicted))
        before, best = best, _best(problem, trained)
        idle = idle + 1 if best - before < settings.least_gain else 0
    if idle >= settings.stop_after:
        return _found(problem, trained, _no_gain(settings))
    everything = len(trained) == len(problem.candidates())
    return _found(problem, trained, ALL if everything else f"{limit} paths were trained, as many as allowed")


def printed_algorithm(
    problem: PathProblem, train: Train, predict: Predictor, settings: SearchSettings = DEFAULT
) -> SearchResult:
    """Search by Algorithm 1 as the paper prints it; :func:`search_paths` mends what is wrong with it.

    Trained paths stay among the candidates, so that a stage may choose one again, and nothing new is learned from
    there on. The gain of a stage is against the stage before, so that a bad stage makes the next one look good. What it
    returns is the path of the last stage, be it worse than another one or than the local network.

    Args:
        problem: What to choose from.
        train: Trains a path; called once for each, as training it again would give the same.
        predict: Predicts accuracies.
        settings: How it runs: ``each`` must be 1, ``exploration`` 0 and ``most`` ``None``.

    Raises:
        ValueError: ``train`` returns no accuracy, or the settings ask for what the algorithm does not have.
    """
    if settings.each != 1 or settings.exploration or settings.most is not None:
        raise ValueError("the printed algorithm has each=1, exploration=0 and most=None; use the corrected one")
    candidates = problem.candidates()
    if not candidates:
        return _kept(problem)
    known = {path: _train(problem, train, path, 0) for path in _first(candidates, settings)}
    last, before, idle, stage = next(iter(known.values())), -math.inf, 0, 0
    while idle < settings.stop_after:
        stage += 1
        path, predicted = _ranked(problem, list(known.values()), candidates, predict, 0.0)[0]
        if path not in known:
            known[path] = _train(problem, train, path, stage, predicted)
        last = known[path]
        idle = idle + 1 if last.value - before < settings.least_gain else 0
        before = last.value
    trained = tuple(known.values())
    return SearchResult(last.path, problem.paths[last.path], last.accuracy, last.value, trained, _no_gain(settings))


def random_search(problem: PathProblem, train: Train, count: int, seed: int = 0) -> SearchResult:
    """Train paths drawn at random; return the best one, or the local network as it is.

    Args:
        problem: What to choose from.
        train: Trains a path.
        count: How many to train, or all where there are fewer.
        seed: Of the draw.

    Raises:
        ValueError: ``train`` returns no accuracy, or a number is out of range.
    """
    whole_number("count", count)
    candidates = problem.candidates()
    drawn = _first(candidates, SearchSettings(start=count, seed=seed))
    return _each(problem, train, drawn, f"{len(drawn)} paths drawn at random were trained")


def exhaustive_search(problem: PathProblem, train: Train) -> SearchResult:
    """Train every path there is to choose from; return the best one, or the local network as it is.

    Args:
        problem: What to choose from.
        train: Trains a path.

    Raises:
        ValueError: ``train`` returns no accuracy.
    """
    return _each(problem, train, problem.candidates(), ALL)


def _each(problem: PathProblem, train: Train, paths: Sequence[Path], reason: str) -> SearchResult:
    if not paths:
        return _kept(problem)
    return _found(problem, [_train(problem, train, path, i) for i, path in enumerate(paths)], reason)


def _first(candidates: Sequence[Path], settings: SearchSettings) -> list[Path]:
    """Draw the first set; that of a larger one begins with that of a smaller one."""
    order = np.random.default_rng(settings.seed).permutation(len(candidates))
    return [candidates[i] for i in order[: settings.start]]


def _train(problem: PathProblem, train: Train, path: Path, stage: int, predicted: float | None = None) -> TrainedPath:
    accuracy = check_fraction(f"what training the path {path} gave", train(path))
    return TrainedPath(path, accuracy, problem.worth(path, accuracy), stage, predicted)


def _ranked(
    problem: PathProblem, trained: Sequence[TrainedPath], paths: Sequence[Path], predict: Predictor, exploration: float
) -> list[tuple[Path, float]]:
    """Return paths with their predicted accuracies, those of most worth first."""
    mean, deviation = predict([one.path for one in trained], [one.accuracy for one in trained], paths)
    hoped = np.clip(mean + exploration * deviation, 0, 1).tolist()
    worth = {path: problem.worth(path, accuracy) for path, accuracy in zip(paths, hoped, strict=True)}
    predicted = dict(zip(paths, np.clip(mean, 0, 1).tolist(), strict=True))
    return [(path, predicted[path]) for path in sorted(paths, key=lambda path: -worth[path])]


def _best(problem: PathProblem, trained: Sequence[TrainedPath]) -> float:
    return max(problem.original_value, *(one.value for one in trained))


def _no_gain(settings: SearchSettings) -> str:
    return f"none of the last {settings.stop_after} stages gained {settings.least_gain:g} or more"


def _kept(problem: PathProblem) -> SearchResult:
    """Keep the local network, as there is no path to choose from."""
    reason = "there is no path to choose from; the local network is kept as it is"
    if problem.above_original:
        reason = (
            f"no path is above the local network's {problem.original.throughput.total:.4g} images per second; it is "
            "kept as it is. Let paths leave out more of the local blocks, or give guests more of the host"
        )
    return SearchResult(None, problem.original, problem.accuracy, problem.original_value, (), reason)


def _found(problem: PathProblem, trained: Sequence[TrainedPath], reason: str) -> SearchResult:
    best = max(trained, key=lambda one: one.value)
    if best.value > problem.original_value:
        return SearchResult(best.path, problem.paths[best.path], best.accuracy, best.value, tuple(trained), reason)
    reason += "; none is worth more than the local network, which is kept as it is"
    return SearchResult(None, problem.original, problem.accuracy, problem.original_value, tuple(trained), reason)
