"""Neurosurgeon: the best cut that a single tensor crosses."""

from __future__ import annotations

import numpy as np

from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan
from cleave.planning.planners.problem import Problem
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile


def neurosurgeon(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> Plan:
    r"""Look at the network as a chain and cut it behind its best layer.

    .. math:: j^* = \arg\min_j \sum_{i \le j} t^d_i + \frac{b_j}{R} + \sum_{i > j} t^s_i

    with the energy of the device in place of the time where ``options.objective`` is ``energy``; ``throughput`` and
    ``bytes`` go beyond the paper. After Kang, Hauswald, Gao, Rovinski, Mudge, Mars and Tang, "Neurosurgeon:
    Collaborative Intelligence Between the Cloud and Mobile Edge", ASPLOS 2017, algorithm 1.

    Limits: where several tensors pass everywhere but at the ends, nothing lies between device-only and server-only; and
    it chooses for one task alone, not for a stream.

    Args:
        graph: The network, see :func:`layer_graph`.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options.

    Raises:
        ValueError: A profile is of another network, or nothing is known of the device's power for its energy.
    """
    problem = Problem(graph, device, link, server, options)
    sets = problem.single_cuts()
    costs = problem.costs(sets)
    best = int(np.lexsort((costs.latency, costs.of(options.objective)))[0])
    why = f"the best {options.objective} of {sets.shape[1]} cuts that one tensor or none crosses"
    return problem.plan(sets[:, best], "neurosurgeon", why, exact=False)
