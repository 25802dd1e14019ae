"""How far published planners are from the optimum, and how often the optimum sends several tensors.

Networks × devices × widths × rates; the server is an RTX A6000, images are uint8, the answer is left out as published.
A gap is the planner's value over the optimum's, 1 where it is the optimum. The gain of several tensors is the best
value of all cuts that one tensor or none crosses, over the optimum.

    python benchmarks/planning/gaps.py [--cache DIR] [--networks NAME …]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

from graphs import NETWORKS, graph_of, machine

from cleave.planning import (
    Link,
    PlanOptions,
    dads_heavy,
    dads_light,
    jps,
    layer_graph,
    local,
    neurosurgeon,
    optima,
    roofline,
)
from cleave.planning import server as all_on_the_server
from cleave.planning.planners.problem import Problem
from cleave.reports.terminal import table
from cleave.scripts.assembly.starting.terminal import quiet

DEVICES = ("jetson_xavier_nx", "jetson_tx2", "raspberry_pi_4")
BITS, RATES = (32, 8, 4), (1, 2, 5, 10, 20, 50, 70, 100)
PLANNERS = {
    "local": local, "server": all_on_the_server, "neurosurgeon": neurosurgeon, "dads_light": dads_light,
    "dads_heavy": dads_heavy, "jps": jps,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("logs/graphs"))
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    args = parser.parse_args()
    quiet()
    gaps: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in PLANNERS}
    rows = []
    for name in args.networks:
        nodes, _ = graph_of(name, args.cache)
        graph, away = layer_graph(nodes), roofline(nodes, machine("rtx_a6000"))
        several: dict[str, list[float]] = {"latency": [], "throughput": []}
        cases = list(itertools.product(DEVICES, BITS, RATES))
        profiles = {device: roofline(nodes, machine(device)) for device in DEVICES}
        for device, bits, rate in cases:
            taken = (graph, profiles[device], Link(up=rate), away, PlanOptions(bits=bits, answer=0))
            best = optima(*taken)
            problem = Problem(*taken)
            single = problem.costs(problem.single_cuts())
            for objective, value in (
                ("latency", best["latency"].latency),
                ("throughput", best["throughput"].bottleneck),
            ):
                gain = float(single.of(objective).min()) / value
                several[objective] += [gain] if gain > 1 + 1e-9 else []
            for planner, plan in PLANNERS.items():
                made = plan(*taken)
                gaps[planner][0].append(made.latency / best["latency"].latency)
                gaps[planner][1].append(best["throughput"].throughput / made.throughput)
        counts = [(len(several[key]), max(several[key], default=1.0)) for key in ("latency", "throughput")]
        rows.append((name, len(cases), *(each for count, gain in counts for each in (count, f"{gain:.3f}"))))
    header = ("network", "cases", "latency: several", "largest gain", "throughput: several", "largest gain")
    table("How often several tensors are best, and what they gain over one", rows, header)
    summary = [
        (name, *(f"{f(values):.3f}" for values in pair for f in (statistics.median, max)))
        for name, pair in gaps.items()
    ]
    table("Gap to the optimum", summary, ("planner", "latency, median", "largest", "throughput, median", "largest"))


if __name__ == "__main__":
    main()
