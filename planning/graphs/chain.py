"""The graph of a network of which no more is known than where it can be cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cleave.architectures import CutPoint, GraphNode, NodeGraph
from cleave.planning.graphs.layer_graph import INPUT


def chain_graph(
    points: Sequence[CutPoint], input_shape: tuple[int, ...], macs: int, params: int, outputs: int
) -> NodeGraph:
    """Return a network as a chain of what lies between its cut points.

    Args:
        points: In order, with what was computed until then.
        input_shape: Per-sample shape of the images.
        macs: Multiply-accumulates of the whole network.
        params: Its parameters.
        outputs: Numbers that it returns of a sample.

    Example:
        >>> point = CutPoint("layer1", (4, 8, 8), "NCHW", 1024, 300, 20)
        >>> [(node.name, node.macs) for node in chain_graph([point], (3, 8, 8), 500, 30, 10).nodes]
        [('layer1', 300), ('final', 200)]
    """
    nodes, before, done = [], INPUT, (0, 0)
    for point in points:
        own = (point.macs - done[0], point.params - done[1])
        shape = (1, *point.shape)
        nodes.append(GraphNode(point.name, (before,), shape, 4 * math.prod(shape), *own, "stage", point.name))
        before, done = point.name, (point.macs, point.params)
    nodes.append(GraphNode("final", (before,), (1, outputs), 4 * outputs, macs - done[0], params - done[1], "stage"))
    return NodeGraph(tuple(nodes), ("final",), input_shape)
