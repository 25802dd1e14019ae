"""The plans that no other beats both in latency and in throughput."""

from __future__ import annotations

import numpy as np

from cleave.planning.graphs.closed_sets import TooManySetsError
from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.planners.optimum import candidate_sets
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan
from cleave.planning.planners.problem import Problem
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile


def pareto(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> list[Plan]:
    """Return the front of latency and throughput, from the least latency to the most throughput.

    Args:
        graph: The network, see :func:`layer_graph`.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options; beyond ``limit`` the front is that of some cuts, unless ``exact`` refuses it.

    Raises:
        TooManySetsError: There are more closed sets than the limit, and ``options.exact`` asks for all.
        ValueError: A profile is of another network.
    """
    problem = Problem(graph, device, link, server, options)
    try:
        sets, exact, why = graph.closed_sets(options.limit), True, "no plan has less latency and more throughput"
    except TooManySetsError as error:
        if options.exact:
            raise TooManySetsError(f"exact=true asks for every one, but {error}; or raise the limit") from None
        sets, exact, why = candidate_sets(problem), False, "on the front of the cuts looked at; it may not be optimal"
    costs = problem.costs(sets)
    latency, bottleneck = costs.latency, costs.bottleneck
    order = np.lexsort((bottleneck, latency))
    before = np.minimum.accumulate(np.concatenate([[np.inf], bottleneck[order][:-1]]))
    front = order[bottleneck[order] < before * (1 - 1e-12)]
    return [problem.plan(sets[:, each], f"front {i}", why, exact=exact) for i, each in enumerate(front, 1)]
