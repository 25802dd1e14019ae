"""The one place where a network is taken apart: stages, cut points, and partitions of its graph."""

from cleave.architectures.cutting.stages import (
    LOGITS,
    CutError,
    CutPoint,
    NodeGraph,
    Partition,
    Stages,
    cut,
    cut_points,
    partition,
    spread,
    trace_graph,
)

__all__ = [
    "LOGITS",
    "CutError",
    "CutPoint",
    "NodeGraph",
    "Partition",
    "Stages",
    "cut",
    "cut_points",
    "partition",
    "spread",
    "trace_graph",
]
