"""How long planning takes: tracing, contracting, enumerating, and all planners at one bandwidth, network by network.

The time of all planners is also printed as a share of tracing's, which every plan needs once, and drawn over the number
of closed sets. HRNet has more of them than the limit. Seconds are those that the CPU spent on this process, so that
others on the machine count less.

    python benchmarks/planning/networks.py [--cache DIR] [--plot FILE] [--networks NAME …]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from graphs import NETWORKS, graph_of, machine

from cleave.planning import Link, PlanOptions, TooManySetsError, every_plan, layer_graph, pareto, roofline
from cleave.reports.plotting import COLORS, matplotlib_defaults, new_figure, png
from cleave.reports.terminal import say, table
from cleave.scripts.assembly.starting.terminal import quiet

ABOVE = "timm/hrnet_w18_small"
HEADER = (
    "network",
    "nodes",
    "layers",
    "closed sets",
    "device ms",
    "trace s",
    "contract s",
    "enumerate s",
    "plan s",
    "plan/trace",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("logs/graphs"))
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS, ABOVE])
    args = parser.parse_args()
    quiet()
    rows, points = [], []
    for name in args.networks:
        row, sets, seconds = measured(name, args.cache)
        rows.append(row)
        points += [(sets, seconds)] if sets else []
    table("All planners and the front at 20 Mbit/s, 8 bits", rows, HEADER)
    if args.plot:
        args.plot.write_bytes(growth(points))


def measured(name: str, cache: Path) -> tuple[tuple[str, ...], int, float]:
    nodes, traced = graph_of(name, cache)
    begin = time.process_time()
    graph = layer_graph(nodes)
    contracted = time.process_time()
    try:
        count = graph.closed_sets().shape[1]
    except TooManySetsError as error:
        say(f"{name}: {error}")
        count = 0
    enumerated = time.process_time()
    device, server = roofline(nodes, machine("jetson_xavier_nx")), roofline(nodes, machine("rtx_a6000"))
    taken = (graph, device, Link(up=20, round_trip=0.005), server, PlanOptions(bits=8))
    graph.single_cuts()
    start = time.process_time()
    plans = every_plan(*taken)
    pareto(*taken)
    seconds = time.process_time() - start
    if not count:
        for key in ("optimum (latency)", "optimum (throughput)", "dads_heavy"):
            say(f"{name}, {key}: {plans[key].why}")
    numbers = (contracted - begin, enumerated - contracted, seconds)
    share = f"{seconds / traced:.3f}" if traced else "-"
    row = (name, str(len(nodes.nodes)), str(len(graph.layers)), f"{count:,}" if count else "> 200,000")
    row += (
        f"{1e3 * device.total:.2f}",
        f"{traced:.1f}" if traced else "-",
        *(f"{each:.3f}" for each in numbers),
        share,
    )
    return row, count, seconds


def growth(points: list[tuple[int, float]]) -> bytes:
    with matplotlib_defaults():
        figure = new_figure(3.6)
        axes = figure.add_subplot()
        axes.plot(*zip(*sorted(points), strict=True), color=COLORS[0], marker="o", linestyle="none")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("Closed sets")
        axes.set_ylabel("All planners and the front (s)")
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        return png(figure)


if __name__ == "__main__":
    main()
