"""What a plan costs as a sum over layers and values, for a minimum cut."""

from __future__ import annotations

from cleave.planning.graphs.min_cut import AdditiveCosts
from cleave.planning.planners.problem import Problem


def additive(
    problem: Problem, objective: str = "latency", *, device: float = 1.0, sending: float = 1.0
) -> AdditiveCosts:
    """Return an objective by layer and value.

    Args:
        problem: What is divided.
        objective: ``latency``, ``energy`` or ``bytes``.
        device: Weight of what the device computes.
        sending: Weight of what is sent.

    Raises:
        ValueError: The energy is asked for, and nothing is known of the device's power.
    """
    graph, link = problem.graph, problem.link
    up = [problem.value_bytes(value) for value in graph.values]
    answers = [(value.layer, problem.answer_bytes(value)) for value in graph.values if value.answer]
    if objective == "bytes":
        nothing = [0.0] * len(graph.layers)
        return AdditiveCosts(nothing, nothing, up)
    compute = send = idle = 1.0
    if objective == "energy":
        if (power := problem.device.power) is None:
            raise ValueError("the energy of the device is not known: set its power (idle, compute and send in watts)")
        compute, send, idle = power.compute, power.send, power.idle
    server_costs = [idle * seconds for seconds in problem.server_seconds]
    for layer, size in answers:
        if layer >= 0:
            server_costs[layer] += idle * link.down_seconds(size)
    return AdditiveCosts(
        [device * compute * seconds for seconds in problem.device_seconds],
        server_costs,
        [sending * send * link.up_seconds(size) for size in up],
        idle * link.delay,
        idle * link.delay if any(size for _, size in answers) else 0.0,
    )
