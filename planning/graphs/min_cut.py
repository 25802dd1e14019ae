"""The division of least total cost as a minimum cut between two machines."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import networkx
import numpy as np

from cleave.planning.graphs.layer_graph import LayerGraph

DEVICE, SERVER = "device", "server"
# Capacities are whole numbers, so that flows add up exactly; this is the sum of all of them.
PRECISION = 2**62


@dataclass(frozen=True)
class AdditiveCosts:
    """Costs that add up over layers and values.

    Attributes:
        device: Of each layer on the device.
        server: Of each layer on the server, its answers' way back included.
        up: Of each value, where it is sent up.
        away: Where anything is on the server.
        back: Where any answer is made on the server.
    """

    device: Sequence[float]
    server: Sequence[float]
    up: Sequence[float]
    away: float = 0.0
    back: float = 0.0


def min_cut(graph: LayerGraph, costs: AdditiveCosts) -> np.ndarray:
    """Return the closed set, bool (layers,), that costs the device and the server least together.

    Layers that follow each other without a branch are first joined: of all cuts inside of such a chain only the
    cheapest can be part of the best division.

    Args:
        graph: The network.
        costs: What is to be made small.
    """
    return cut_groups(graph, costs, chain_groups(graph, costs))


def chain_groups(graph: LayerGraph, costs: AdditiveCosts) -> list[int]:
    """Return for each layer the number of its group: chains are divided at their cheapest place alone."""
    users: list[set[int]] = [set() for _ in graph.layers]
    sending = [0.0] * len(graph.layers)
    for number, layer in enumerate(graph.layers):
        for before in layer.needs:
            users[before].add(number)
    for value, cost in zip(graph.values[1:], costs.up[1:], strict=True):
        sending[value.layer] += cost if value.readers else 0.0
    # The layer before, where nothing else lies between the two.
    before_in_chain = {
        number: layer.needs[0]
        for number, layer in enumerate(graph.layers)
        if len(layer.needs) == 1 and users[layer.needs[0]] == {number} and number not in graph.images.readers
    }
    follows = {before: number for number, before in before_in_chain.items()}
    groups = [-1] * len(graph.layers)
    count = 0
    for head in range(len(graph.layers)):
        if head in before_in_chain:
            continue
        chain = [head]
        while chain[-1] in follows:
            chain.append(follows[chain[-1]])
        gained = np.cumsum([costs.device[number] - costs.server[number] for number in chain])
        inner = [float(gained[i]) + sending[number] for i, number in enumerate(chain[:-1])]
        best = int(np.argmin(inner)) if inner else 0
        for i, number in enumerate(chain):
            groups[number] = count + (i > best)
        count += 1 + (len(chain) > 1)
    return groups


def cut_groups(
    graph: LayerGraph,
    costs: AdditiveCosts,
    groups: Sequence[int],
    *,
    reverse: bool = True,
    auxiliary: bool = True,
) -> np.ndarray:
    """Return the division of least cost that keeps groups of layers together, bool (layers,).

    A group is joined to the device with its cost on the server, and to the server with its cost on the device. A value
    has an auxiliary node: what makes it is joined to that by the cost of sending, and it to each reader without
    bound, so that a value with several readers is sent once. An edge back without bound keeps a layer off the device
    whose inputs are not there.

    Args:
        graph: The network.
        costs: What is to be made small.
        groups: The number of each layer's group.
        reverse: Whether there are edges back; a test shows that the cut is wrong without.
        auxiliary: Whether values have nodes of their own; likewise.
    """
    total = sum(map(sum, (costs.device, costs.server, costs.up))) + costs.away + costs.back
    scale = PRECISION / total if total > 0 else 0.0  # where nothing costs anything, any cut is as good
    net = networkx.DiGraph()
    net.add_nodes_from([DEVICE, SERVER])

    def join(a: Hashable, b: Hashable, cost: float) -> None:
        if capacity := round(cost * scale):
            before = net.edges[a, b]["capacity"] if net.has_edge(a, b) else 0
            net.add_edge(a, b, capacity=before + capacity)

    def bind(a: Hashable, b: Hashable) -> None:
        if a != b:
            net.add_edge(a, b)  # without a capacity it has no bound

    for number, layer in enumerate(graph.layers):
        join(DEVICE, groups[number], costs.server[number])
        join(groups[number], SERVER, costs.device[number])
        if costs.away:
            bind("away", groups[number])
        for before in layer.needs if reverse else ():
            bind(groups[number], groups[before])
    for i, value in enumerate(graph.values):
        source = DEVICE if value.layer < 0 else groups[value.layer]
        outside = {groups[reader] for reader in value.readers} - {source}
        if outside and auxiliary:
            join(source, ("sent", i), costs.up[i])
        for reader in sorted(outside):
            if auxiliary:
                bind(("sent", i), reader)
            else:
                join(source, reader, costs.up[i])
        if costs.back and value.answer and value.layer >= 0:
            bind("back", source)
    # What is paid once: a node that is on the server as soon as one of some groups is.
    join(DEVICE, "away", costs.away)
    join(DEVICE, "back", costs.back)
    _, (held, _) = networkx.minimum_cut(net, DEVICE, SERVER, flow_func=networkx.algorithms.flow.preflow_push)
    return np.array([group in held for group in groups])
