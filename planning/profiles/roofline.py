"""Profiles by a roofline: a node is bound by its arithmetic or by its memory."""

from __future__ import annotations

from cleave.architectures import GraphNode, NodeGraph
from cleave.planning.graphs.layer_graph import INPUT, graph_digest
from cleave.planning.profiles.machine import Machine
from cleave.planning.profiles.profile import Profile

FLOAT_BYTES = 4


def roofline(graph: NodeGraph, machine: Machine) -> Profile:
    r"""Derive the seconds of every node from a data sheet.

    .. math:: t_v = \max\left(\frac{2 \cdot \mathrm{MACs}_v}{e \cdot r}, \frac{b_v}{B}\right) + l

    with the rate r and the efficiency e, the bytes b that the node reads and writes (what it takes, its parameters and
    what it makes, float32), the memory's bandwidth B and the time l that an operation takes to start. After Williams,
    Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures", 2009, eq. in
    section 4. A node that makes no tensor takes no time.

    Args:
        graph: As :func:`cleave.architectures.trace_graph` returns it.
        machine: What the data sheet says.

    Raises:
        ValueError: The machine has no rate or no bandwidth.

    Example:
        >>> from torch import nn, zeros
        >>> from cleave.architectures import trace_graph
        >>> graph = trace_graph(nn.Sequential(nn.Flatten(), nn.Linear(12, 10, bias=False)), zeros(1, 3, 2, 2))
        >>> profile = roofline(graph, Machine("toy", rate=24.0, bandwidth=1e9))
        >>> round(profile.seconds["1"], 6)
        10.0
    """
    for name in ("rate", "bandwidth"):
        if getattr(machine, name) is None:
            unit = "FLOP per second" if name == "rate" else "bytes per second"
            raise ValueError(
                f"the machine {machine.name} has no {name}; set its {name} in {unit}, or give a measured profile"
            )
    moved = bytes_moved(graph)
    seconds = {node.name: _seconds(node, moved[node.name], machine) for node in graph.nodes}
    return Profile(machine.name, graph_digest(graph), seconds, "roofline", machine.power)


def bytes_moved(graph: NodeGraph) -> dict[str, int]:
    """Return the bytes that each node reads and writes for one sample: its inputs, its parameters, its value."""
    size = {INPUT: FLOAT_BYTES * graph.input_values} | {node.name: node.bytes for node in graph.nodes}
    return {
        node.name: node.bytes + FLOAT_BYTES * node.params + sum(size[source] for source in dict.fromkeys(node.inputs))
        for node in graph.nodes
    }


def _seconds(node: GraphNode, moved: int, machine: Machine) -> float:
    if node.shape is None and node.macs == 0:
        return 0.0
    assert machine.rate is not None
    assert machine.bandwidth is not None
    return max(2 * node.macs / (machine.efficiency * machine.rate), moved / machine.bandwidth) + machine.launch
