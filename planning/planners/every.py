"""All planners by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.planners.dads import dads_heavy, dads_light
from cleave.planning.planners.jps import jps
from cleave.planning.planners.local import local
from cleave.planning.planners.neurosurgeon import neurosurgeon
from cleave.planning.planners.optimum import optima
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan
from cleave.planning.planners.server import server
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile

Planner = Callable[[LayerGraph, Profile, Link, Profile, PlanOptions], Plan]
PLANNERS: dict[str, Planner] = {
    "local": local,
    "server": server,
    "neurosurgeon": neurosurgeon,
    "dads_light": dads_light,
    "dads_heavy": dads_heavy,
    "jps": jps,
}
"""The two ends and the published planners by name."""


def every_plan(
    graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions
) -> dict[str, Plan]:
    """Return the plan of every planner and the optimum of every objective, by name.

    Neurosurgeon chooses by energy where that is the objective, else by latency, as published.

    Args:
        graph: The network, see :func:`layer_graph`.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options.

    Raises:
        TooManySetsError: There are more closed sets than the limit, and ``options.exact`` asks for all.
        ValueError: A profile is of another network.
    """
    best = optima(graph, device, link, server, options)  # first, as it alone may refuse the graph
    published = options.objective if options.objective == "energy" else "latency"
    own = dataclasses.replace(options, objective=published)
    found = {name: planner(graph, device, link, server, own) for name, planner in PLANNERS.items()}
    return found | {f"optimum ({name})": plan for name, plan in best.items()}
