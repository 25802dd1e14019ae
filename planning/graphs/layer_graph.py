"""A network as layers that a planner places whole, and the values that may pass between two machines."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import networkx
import numpy as np

from cleave.architectures import NodeGraph
from cleave.deployment.bundle.canonical_json import digest
from cleave.planning.graphs.closed_sets import TooManySetsError, closed_sets

INPUT = "input"
LIMIT = 200_000
"""Closed sets that are enumerated at most, unless told otherwise."""


@dataclass(frozen=True)
class Layer:
    """Nodes of a network that run in one place, as what passes between them is no tensor.

    Attributes:
        name: The last of its nodes that makes a tensor.
        nodes: Their names in the order of execution.
        needs: Numbers of the layers that it reads from.
    """

    name: str
    nodes: tuple[str, ...]
    needs: tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A tensor that may be sent.

    Attributes:
        name: The node that makes it; ``input`` for the images.
        layer: Number of that node's layer; -1 for the images, which the device has.
        count: Its numbers for one sample.
        readers: Numbers of the other layers that take it.
        answer: Whether the network returns it.
    """

    name: str
    layer: int
    count: int
    readers: tuple[int, ...]
    answer: bool = False


class Sides(NamedTuple):
    """A division of a network into the nodes of two machines, as ``partition`` takes it."""

    device: tuple[str, ...]
    server: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """The layers of a network in an order of execution, and the values between them; see :func:`layer_graph`.

    Attributes:
        layers: All layers; each needs earlier ones only.
        values: What may be sent, the images first.
        free: Nodes of no layer: numbers that follow from the images' size, which either side has.
        nodes: The graph that it was made of.
        digest: SHA-256 of that graph, by which a profile knows its network.
    """

    layers: tuple[Layer, ...]
    values: tuple[Value, ...]
    free: tuple[str, ...]
    nodes: NodeGraph
    digest: str
    _cache: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _refused: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def images(self) -> Value:
        """The images."""
        return self.values[0]

    def closed_sets(self, limit: int = LIMIT) -> np.ndarray:
        """Return every set of layers that a device can hold: with a layer, all that it needs.

        Device-only and server-only, the full and the empty set, are among them.

        Args:
            limit: The most to enumerate.

        Returns:
            bool (layers, sets): column j is a set. The first is empty, the last full.

        Raises:
            TooManySetsError: There are more; the message says what can be done without them.
        """
        if limit in self._refused:
            raise TooManySetsError(self._refused[limit])  # known, and it took its time
        found = self._cache.get("closed")
        if found is None or found.shape[1] > limit:
            try:
                found = self._cache["closed"] = closed_sets([layer.needs for layer in self.layers], limit)
            except TooManySetsError as error:
                self._refused[limit] = str(error)
                raise
        return found

    def sent(self, members: np.ndarray) -> list[Value]:
        """List the values that cross when the device holds some layers, each once however many read it.

        Args:
            members: bool (layers,).
        """
        return [value for value, crosses in zip(self.values, self.crossings(members), strict=True) if crosses]

    def crossings(self, members: np.ndarray) -> np.ndarray:
        """Return which values cross, bool (values, …), for each of some sets; computed once for all closed sets.

        Args:
            members: bool (layers, …), as :meth:`closed_sets` returns them.
        """
        every = members is self._cache.get("closed")
        if every and "crossings" in self._cache:
            return self._cache["crossings"]
        found = np.empty((len(self.values), *members.shape[1:]), dtype=bool)
        for i, value in enumerate(self.values):
            made = True if value.layer < 0 else members[value.layer]
            found[i] = made & ~members[list(value.readers)].all(0)
        if every:
            self._cache["crossings"] = found
        return found

    def closure(self, layers: Collection[int]) -> np.ndarray:
        """Return the smallest set, bool (layers,), that holds some layers and all that they need."""
        members, todo = np.zeros(len(self.layers), dtype=bool), list(layers)
        while todo:
            if not members[number := todo.pop()]:
                members[number] = True
                todo += self.layers[number].needs
        return members

    def single_cuts(self) -> np.ndarray:
        """Return the sets behind which a single tensor passes on, bool (layers, N), in the order of execution.

        Behind each value stands the smallest set that makes it.
        """
        if "single" not in self._cache:
            bits = [0] * len(self.layers)
            for number, layer in enumerate(self.layers):
                bits[number] = 1 << number
                for before in layer.needs:
                    bits[number] |= bits[before]
            readers = [sum(1 << reader for reader in value.readers) for value in self.values]
            found = []
            for value in self.values[1:]:
                held = bits[value.layer]
                crossing = (
                    other.name
                    for other, needed in zip(self.values, readers, strict=True)
                    if (other.layer < 0 or held >> other.layer & 1) and needed & ~held
                )
                if next(crossing, None) == value.name and next(crossing, None) is None:
                    found.append([held >> number & 1 for number in range(len(self.layers))])
            self._cache["single"] = np.array(found, dtype=bool).reshape(-1, len(self.layers)).T
        return self._cache["single"]

    def sides(self, members: np.ndarray) -> Sides:
        """Return the nodes of both machines in the order of execution."""
        held = {name for layer, here in zip(self.layers, members, strict=True) if here for name in layer.nodes}
        if held:
            held.update(self.free)  # the images are there
        names = [node.name for node in self.nodes.nodes]
        return Sides(tuple(n for n in names if n in held), tuple(n for n in names if n not in held))


def layer_graph(graph: NodeGraph) -> LayerGraph:
    """Contract a network's nodes to layers that can be placed freely.

    A node whose value is no tensor has no place of its own. A number that follows from the input's size goes with what
    it is computed from, and binds nobody who reads it; a tuple or a whole shape runs where its readers run. Left to
    float such nodes would multiply the sets to choose from: those of ViT-B/16 run into millions, and are 143 without.

    Args:
        graph: As :func:`cleave.architectures.trace_graph` returns it.

    Raises:
        ValueError: The graph has no nodes.

    Example:
        >>> from torch import nn, zeros
        >>> from cleave.architectures import trace_graph
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
        >>> graph = layer_graph(trace_graph(network, zeros(1, 3, 8, 8)))
        >>> [layer.name for layer in graph.layers], graph.closed_sets().shape
        (['0', '1', '2'], (3, 4))
        >>> [(value.name, value.count) for value in graph.sent(graph.closure([1]))]
        [('1', 288)]
    """
    if not graph.nodes:
        raise ValueError("the network has no node that depends on its input; there is nothing to place")
    carrier = _carriers(graph)
    bound = networkx.DiGraph()
    bound.add_nodes_from(name for name in carrier.values() if name != INPUT)
    crossing = {node.name: node.crosses for node in graph.nodes}
    reads: list[tuple[str, str]] = []
    for node in graph.nodes:
        # What reads numbers alone stays behind what they are of: a part needs something to take the batch size from.
        numbers = all(crossing.get(source) == "folded" for source in node.inputs)
        for source in node.inputs:
            here, there = carrier[node.name], carrier.get(source, INPUT)
            folded = crossing.get(source) == "folded"
            if here in (there, INPUT) or (folded and not numbers):
                continue
            if not folded:
                reads.append((source, here))
            if there != INPUT:
                bound.add_edge(there, here)
                if crossing.get(source) == "never":
                    bound.add_edge(here, there)
    return _assembled(graph, carrier, bound, reads)


def _carriers(graph: NodeGraph) -> dict[str, str]:
    """Return for every node the one that it goes with: itself, or what it is computed from, or ``input``."""
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    kept: set[str] = set()
    for node in reversed(graph.nodes):
        # A tuple whose parts are tensors is a step of its own; one of which only numbers are read is not.
        if node.crosses == "tensor" or node.name in kept:
            kept.add(node.name)
            kept.update(s for s in node.inputs if s in position and graph.nodes[position[s]].crosses == "never")
    carrier = {INPUT: INPUT}
    for node in graph.nodes:
        sources = [carrier[source] for source in node.inputs]
        latest = max(sources, key=lambda name: position.get(name, -1), default=INPUT)
        carrier[node.name] = node.name if node.name in kept else latest
    return carrier


def _assembled(
    graph: NodeGraph, carrier: dict[str, str], bound: networkx.DiGraph, reads: list[tuple[str, str]]
) -> LayerGraph:
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    groups = networkx.condensation(bound)
    first = {number: min(position[name] for name in groups.nodes[number]["members"]) for number in groups}
    order = list(networkx.lexicographical_topological_sort(groups, key=first.__getitem__))
    place = {number: i for i, number in enumerate(order)}
    layer_of = {name: place[number] for name, number in groups.graph["mapping"].items()}
    nodes: list[list[str]] = [[] for _ in order]
    for node in graph.nodes:
        if carrier[node.name] != INPUT:
            nodes[layer_of[carrier[node.name]]].append(node.name)
    tensors = {node.name for node in graph.nodes if node.crosses == "tensor"}
    layers = tuple(
        Layer(
            next((name for name in reversed(names) if name in tensors), names[-1]),
            tuple(names),
            tuple(sorted(place[before] for before in groups.predecessors(number))),
        )
        for number, names in zip(order, nodes, strict=True)
    )
    readers: dict[str, set[int]] = {}
    for source, reader in reads:
        readers.setdefault(source, set()).add(layer_of[reader])
    values = [Value(INPUT, -1, graph.input_values, tuple(sorted(readers.get(INPUT, ()))), INPUT in graph.outputs)]
    for node in graph.nodes:
        if node.name in tensors:
            layer = layer_of[node.name]
            others = tuple(sorted(readers.get(node.name, set()) - {layer}))
            values.append(Value(node.name, layer, node.bytes // 4, others, node.name in graph.outputs))
    free = tuple(node.name for node in graph.nodes if carrier[node.name] == INPUT)
    return LayerGraph(layers, tuple(values), free, graph, graph_digest(graph))


def graph_digest(graph: NodeGraph) -> str:
    """Return the SHA-256 of a network's nodes, their shapes and costs, and its input's shape."""
    nodes = [
        [node.name, list(node.inputs), None if node.shape is None else list(node.shape), node.macs, node.params]
        for node in graph.nodes
    ]
    return digest({"nodes": nodes, "outputs": list(graph.outputs), "input": list(graph.input_shape)})
