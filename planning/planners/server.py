"""All on the server: the images are sent as their codec makes them."""

from __future__ import annotations

from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan
from cleave.planning.planners.problem import Problem
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile


def server(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> Plan:
    """Send the images, and run everything on the server.

    What an image costs, ``options.image``, often decides more than the planner does: a JPEG of ImageNet has 45 KB, and
    the float32 numbers that published planners send have 602 KB.

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
    return problem.plan(problem.nothing(), "server", f"the images are sent as {options.image}", exact=False)
