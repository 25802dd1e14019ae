"""All on the device: one of the two plans that every other is compared with."""

from __future__ import annotations

from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan
from cleave.planning.planners.problem import Problem
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile


def local(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> Plan:
    """Run everything on the device and send nothing.

    Args:
        graph: The network, see :func:`layer_graph`.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options.

    Raises:
        ValueError: A profile is of another network.
    """
    problem = Problem(graph, device, link, server, options)
    return problem.plan(problem.everything(), "local", "everything runs on the device", exact=False)
