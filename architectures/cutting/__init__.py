"""The one place where a network is taken apart: stages, cut points, and partitions of its graph."""

from cleave.architectures.cutting.cut_points import CutPoint, cut_points, spread
from cleave.architectures.cutting.node_graph import GraphNode, NodeGraph, Partition, partition, trace_graph, visit_nodes
from cleave.architectures.cutting.refusals import CutError
from cleave.architectures.cutting.stages import LOGITS, Stages, cut

__all__ = [
    "LOGITS",
    "CutError",
    "CutPoint",
    "GraphNode",
    "NodeGraph",
    "Partition",
    "Stages",
    "cut",
    "cut_points",
    "partition",
    "spread",
    "trace_graph",
    "visit_nodes",
]
