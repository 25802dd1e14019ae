"""How well Algorithm 1 finds the best path on tables of paths that were all trained, beside random search.

Each table is a CSV as a search over all paths writes it, of one pair of networks. For each of some starting draws the
search may train a third of the candidates, and random search as many; a hit is within ε of the table's best reward.

    python benchmarks/path_search.py FILE.csv [FILE.csv …] [--draws 10] [--least-accuracy 0.86]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from cleave.planning import (
    GaussianProcess,
    Logistic,
    PathReward,
    SearchSettings,
    exhaustive_search,
    path_problem,
    printed_algorithm,
    random_search,
    reward_value,
    search_paths,
)
from cleave.reports.paths.tables import PathTable, read_path_table
from cleave.reports.terminal import table
from cleave.scripts.assembly.starting.terminal import quiet

GAIN = 0.01  # ε
LEAST_ACCURACY = 0.86  # A_min


class Compared(NamedTuple):
    """What some starting draws came to on one table.

    Attributes:
        candidates: Paths above the local network's throughput.
        best: The best reward of all.
        hits: Draws of which the corrected search found a path within ε of it.
        printed: The same of the algorithm as printed.
        random: The same of random search, with as many paths trained as by the corrected one.
        trained: Mean number of paths trained.
        most: Largest number of paths trained.
    """

    candidates: int
    best: float
    hits: int
    printed: int
    random: int
    trained: float
    most: int


def compare(
    known: PathTable,
    local: int,
    host: int,
    draws: int = 10,
    start: int = 2,
    stop_after: int = 5,
    least_accuracy: float = LEAST_ACCURACY,
) -> Compared:
    """Search a table from several starting draws, by its numbers of blocks.

    With c_stop = 3 a search often ends before it has trained the third that it may; the printed algorithm keeps it.

    Raises:
        ValueError: A candidate was not trained, or none is worth more than the local network, so that any search would
            find the best there is.
    """
    value = reward_value(PathReward(Logistic(8.0, least_accuracy)), known.accuracy)
    problem = path_problem(known.original, known.accuracy, known.loads, value)
    candidates = problem.candidates()
    if missing := [path for path in candidates if path not in known.accuracies]:
        raise ValueError(f"the table is not exhaustive: {missing[0]} is above the original and was not trained")
    train, predict = known.accuracies.__getitem__, GaussianProcess(local, host)
    whole = exhaustive_search(problem, train)
    if whole.path is None:
        raise ValueError(
            f"with A_min={least_accuracy:g} no path is worth more than the local network, which every search keeps "
            "then; lower it towards the accuracies of the paths"
        )
    best = whole.value
    hits, printed, random, trained = 0, 0, 0, []
    for draw in range(draws):
        most = max(1, len(candidates) // 3)
        settings = SearchSettings(start, stop_after=stop_after, least_gain=GAIN, most=most, seed=draw)
        found = search_paths(problem, train, predict, settings)
        as_printed = printed_algorithm(problem, train, predict, SearchSettings(start, least_gain=GAIN, seed=draw))
        drawn = random_search(problem, train, max(1, len(found.trained)), seed=10_000 + draw)
        hits += found.value >= best - GAIN
        printed += as_printed.value >= best - GAIN
        random += drawn.value >= best - GAIN
        trained.append(len(found.trained))
    return Compared(len(candidates), best, hits, printed, random, statistics.mean(trained), max(trained))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+", metavar="FILE.csv")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--start", type=int, default=2, help="paths of the first set")
    parser.add_argument("--stop-after", type=int, default=5, help="c_stop of the mended algorithm; as printed it is 3")
    parser.add_argument("--least-accuracy", type=float, default=LEAST_ACCURACY, help="A_min of the reward")
    parser.add_argument("--local-blocks", type=int, default=6)
    parser.add_argument("--host-blocks", type=int, default=6)
    args = parser.parse_args()
    quiet()
    rows = []
    for file in args.tables:
        found = compare(
            read_path_table(file),
            args.local_blocks,
            args.host_blocks,
            args.draws,
            args.start,
            args.stop_after,
            args.least_accuracy,
        )
        shares = [f"{count} of {args.draws}" for count in (found.hits, found.printed, found.random)]
        rows.append((file.name, found.candidates, f"{found.best:.3f}", f"{found.trained:.1f}", *shares))
    header = ("table", "candidates", "best reward", "trained", "Algorithm 1", "as printed", "random")
    table(f"Starting draws within {GAIN:g} of the best reward", rows, header)


if __name__ == "__main__":
    main()
