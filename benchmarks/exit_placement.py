"""How far exit placement is from the optimum, on random instances that brute force can solve.

With a noise of 0 all candidates rank samples alike, so that decisions are nested and the dynamic programme is proven
exact. With noise they are not, and with the exhaustive search turned off it is a heuristic.

    python benchmarks/exit_placement.py [--instances 200] [--samples 500] [--candidates 10] [--count 4]
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import torch

from cleave.planning import place_exits
from cleave.reports.terminal import table
from cleave.scripts.assembly.starting.terminal import quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--count", type=int, default=4)
    args = parser.parse_args()
    quiet()
    rows = [measure(args, noise) for noise in (0.0, 0.1, 0.3, 1.0)]
    title = f"Dynamic programme against brute force, {args.count} of {args.candidates} exits, {args.samples} samples"
    table(title, rows, ("noise", "equal", "mean gap (points)", "max gap (points)", "seconds", "brute force"))


def measure(args: argparse.Namespace, noise: float) -> tuple[str, ...]:
    """Compare both on instances of one kind; those whose budget nothing keeps to are left out."""
    gaps: list[float] = []
    seconds = np.zeros(2)
    for seed in itertools.count():
        if len(gaps) == args.instances:
            break
        instance, budget = random_instance(args, noise, np.random.default_rng(seed))
        begin = time.perf_counter()
        best = brute_force(*instance, args.count, budget)
        middle = time.perf_counter()
        if best is None:
            continue
        correct, leaves, stages, heads = instance
        bits = torch.from_numpy(correct), torch.from_numpy(leaves)
        found = place_exits(*bits, stages, heads, args.count, budget, exhaustive_up_to=0)
        seconds += time.perf_counter() - middle, middle - begin
        gaps.append(100 * (best - found.accuracy))
    equal = np.mean(np.array(gaps) < 1e-9)
    times = [f"{value / len(gaps):.4f}" for value in seconds]
    return f"{noise:g}", f"{equal:.1%}", f"{np.mean(gaps):.4f}", f"{max(gaps):.3f}", *times


def random_instance(args: argparse.Namespace, noise: float, generator: np.random.Generator):
    """Samples of varying ease and candidates of rising power: who is sure leaves, and is mostly right."""
    shape = (args.candidates + 1, args.samples)
    power = np.sort(generator.normal(size=args.candidates + 1))[:, None]
    scores = power + generator.normal(size=args.samples) + noise * generator.normal(size=shape)
    correct = scores + 0.5 * generator.normal(size=shape) > -0.5
    stages = generator.integers(100, 1000, args.candidates + 1).tolist()
    heads = generator.integers(1, 100, args.candidates).tolist()
    return (correct, scores[:-1] > 0.5, stages, heads), float(generator.uniform(0.3, 0.9) * sum(stages))


def brute_force(correct, leaves, stages, heads, count: int, budget: float) -> float | None:
    """The best accuracy within the budget, by trying every choice; None if none keeps to it."""
    reach, best = np.cumsum(stages), None
    last, batch = len(heads), leaves.shape[1]
    for chosen in itertools.combinations(range(last), count):
        first = np.concatenate([leaves[list(chosen)], np.ones((1, batch), dtype=bool)]).argmax(0)
        exits = np.array([*chosen, last])[first]
        paid = np.cumsum([*(heads[j] for j in chosen), 0])[first]
        if (reach[exits] + paid).mean() <= budget:
            accuracy = correct[exits, np.arange(batch)].mean()
            best = accuracy if best is None else max(best, accuracy)
    return best


if __name__ == "__main__":
    main()
