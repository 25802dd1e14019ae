"""Plain networks: backbones, cutting, bottlenecks, quantisers and split networks."""

from architectures.backbones import Backbone, create_backbone
from architectures.bottleneck import Bottleneck, build_bottleneck
from architectures.costs import profile
from architectures.macs import count_macs, count_params
from architectures.partitions import DevicePart, ServerPart, WholePart, export_parts
from architectures.quantizer import UniformQuantizer
from architectures.recalibrate import recalibrate_batchnorm
from architectures.split import SplitNetwork
from architectures.stages import (
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
    "Backbone",
    "Bottleneck",
    "CutError",
    "CutPoint",
    "DevicePart",
    "NodeGraph",
    "Partition",
    "ServerPart",
    "SplitNetwork",
    "Stages",
    "UniformQuantizer",
    "WholePart",
    "build_bottleneck",
    "count_macs",
    "count_params",
    "create_backbone",
    "cut",
    "cut_points",
    "export_parts",
    "partition",
    "profile",
    "recalibrate_batchnorm",
    "spread",
    "trace_graph",
]
