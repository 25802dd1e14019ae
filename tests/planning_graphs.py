"""What the tests of planners share: random networks as graphs, times for them, and what each division costs by hand."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from cleave.architectures.cutting.node_graph import GraphNode, NodeGraph
from cleave.planning import LayerGraph, Link, PlanOptions, Power, Profile, graph_digest, layer_graph


class Case(NamedTuple):
    """What a planner takes."""

    graph: LayerGraph
    device: Profile
    link: Link
    server: Profile
    options: PlanOptions


def random_graph(draw: random.Random, count: int, several: bool = True) -> NodeGraph:
    """A network of some nodes, each of which reads up to three earlier ones or the images.

    Of every second one all is returned that nobody reads; where ``several`` is false, the last node reads that.
    """
    nodes = []
    for number in range(count):
        known = ["input", *(f"n{i}" for i in range(number))]
        inputs = draw.sample(known[-4:], draw.randint(1, min(3, len(known[-4:]))))
        size = draw.randint(1, 2000)
        nodes.append(GraphNode(f"n{number}", tuple(inputs), (1, size), 4 * size, 0, 0))
    read = {source for node in nodes for source in node.inputs}
    unread = tuple(node.name for node in nodes[:-1] if node.name not in read)
    shape = (3, draw.randint(1, 20), 16)
    if several and draw.random() < 0.5:
        return NodeGraph(tuple(nodes), (*unread, nodes[-1].name), shape)
    nodes[-1] = dataclasses.replace(nodes[-1], inputs=tuple(dict.fromkeys([*nodes[-1].inputs, *unread])))
    return NodeGraph(tuple(nodes), (nodes[-1].name,), shape)


def random_case(seed: int, least: int = 4, most: int = 9, several: bool = True, **options: object) -> Case:
    """A random network with random times; the device is slower than the server in the mean."""
    draw = random.Random(seed)
    nodes = random_graph(draw, draw.randint(least, most), several)
    graph = layer_graph(nodes)
    slow = draw.uniform(1, 10)
    device = {node.name: slow * draw.expovariate(1) / 1000 for node in nodes.nodes}
    server = {node.name: draw.expovariate(1) / 1000 for node in nodes.nodes}
    link = Link(up=draw.uniform(1, 40), down=draw.uniform(1, 40), round_trip=draw.choice([0.0, 0.004]))
    power = Power(1.0, draw.uniform(2, 10), draw.uniform(2, 10))
    digest = graph_digest(nodes)
    return Case(
        graph, Profile("device", digest, device, power=power), link, Profile("server", digest, server),
        PlanOptions(**options),  # type: ignore[arg-type]
    )  # fmt: skip


class Division(NamedTuple):
    """What one division costs, by hand."""

    held: frozenset[str]
    stages: tuple[float, float, float, float]
    latency: float
    energy: float
    bytes: int


def by_hand(case: Case) -> Iterator[Division]:
    """Look at every subset of the nodes, leave out those that need a node of the server, and add up what is left."""
    nodes, link, options = case.graph.nodes, case.link, case.options
    names = [node.name for node in nodes.nodes]
    for size in range(len(names) + 1):
        for held in map(frozenset, itertools.combinations(names, size)):
            if any(source not in held | {"input"} for n in nodes.nodes if n.name in held for source in n.inputs):
                continue
            crossing = {s for n in nodes.nodes if n.name not in held for s in n.inputs if s in held | {"input"}}
            count = {node.name: node.bytes // 4 for node in nodes.nodes}
            sent = sum(-(-count[s] * options.bits // 8) for s in crossing - {"input"})
            if "input" in crossing:
                shape = nodes.input_shape
                sent += shape[0] * shape[1] * shape[2]  # as uint8
            back = sum(4 * count[name] for name in nodes.outputs if name not in held)
            assert link.up is not None
            assert link.down is not None
            stages = (
                sum(case.device.seconds[name] for name in held),
                8e-6 * sent / link.up,
                sum(case.server.seconds[name] for name in names if name not in held),
                8e-6 * back / link.down,
            )
            delay = link.round_trip / 2 * (bool(crossing) + bool(back))
            power = case.device.power
            assert power is not None
            energy = power.compute * stages[0] + power.send * stages[1] + power.idle * (stages[2] + stages[3] + delay)
            yield Division(held, stages, sum(stages) + delay, energy, sent)
