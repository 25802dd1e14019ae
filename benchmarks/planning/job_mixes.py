"""How often mixing two adjacent cuts, as JPS does, is the best of all mixtures of cuts.

Random lines of cuts: seconds on the device grow, seconds of sending fall. For every number of jobs all multisets of the
cuts are ordered by Johnson's rule; the adjacent mix counts as optimal if none is done earlier.

    python benchmarks/planning/job_mixes.py [--lines 200] [--cuts 5]
"""

from __future__ import annotations

import argparse
import itertools
import random

from cleave.planning import johnson_order, makespan
from cleave.planning.planners.jps import adjacent_mix
from cleave.reports.terminal import table

JOBS = (2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--cuts", type=int, default=5)
    args = parser.parse_args()
    for kind, make in KINDS.items():
        rows = []
        for jobs in JOBS:
            ratios = [ratio(make(random.Random(seed), args.cuts), jobs) for seed in range(args.lines)]
            optimal = sum(each < 1 + 1e-9 for each in ratios) / len(ratios)
            rows.append((jobs, f"{optimal:.3f}", f"{sum(ratios) / len(ratios):.4f}", f"{max(ratios):.4f}"))
        title = f"Adjacent mix over the best of all multisets of {args.cuts} cuts, {args.lines} {kind}"
        table(title, rows, ("jobs", "share optimal", "mean ratio", "worst ratio"))


def inner(draw: random.Random, cuts: int) -> list[tuple[float, float]]:
    """Every cut computes on the device and sends."""
    first, second = (sorted(draw.uniform(0, 1) for _ in range(cuts)) for _ in range(2))
    return list(zip(first, second[::-1], strict=True))


def convex(draw: random.Random, cuts: int) -> list[tuple[float, float]]:
    """The same, and each step saves less sending for a second on the device than the one before, as JPS assumes."""
    drawn = [(draw.uniform(0, 1), draw.uniform(0, 1)) for _ in range(cuts)]
    steps = sorted(drawn, key=lambda step: step[0] / step[1])
    total = sum(down for _, down in steps)
    line, done, left = [], 0.0, total
    for along, down in steps:
        done, left = done + along, left - down
        line.append((done, left + 0.1 * total))
    return line


def with_ends(draw: random.Random, cuts: int) -> list[tuple[float, float]]:
    """The first computes nothing on the device, and the last sends nothing."""
    line = inner(draw, cuts)
    return [(0.0, line[0][1]), *line[1:-1], (line[-1][0], 0.0)]


KINDS = {"lines": inner, "convex lines": convex, "lines with server-only and device-only": with_ends}


def ratio(pairs: list[tuple[float, float]], jobs: int) -> float:
    mixed = makespan([pairs[cut] for cut in adjacent_mix(pairs, jobs)])
    best = mixed
    for chosen in itertools.combinations_with_replacement(pairs, jobs):
        firsts, seconds = zip(*chosen, strict=True)
        if max(sum(firsts) + min(seconds), sum(seconds) + min(firsts)) < best:  # else it cannot be done earlier
            best = min(best, makespan([chosen[i] for i in johnson_order(chosen)]))
    return mixed / best


if __name__ == "__main__":
    main()
