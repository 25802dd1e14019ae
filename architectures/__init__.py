"""Plain networks: backbones, cutting, bottlenecks, quantisers and split networks."""

from architectures.backbones import Backbone, create_backbone
from architectures.bottleneck import Bottleneck, build_bottleneck
from architectures.calibration import calibrate_range
from architectures.channels import BitErrors, GaussianNoise, PacketLoss, build_channel
from architectures.costs import profile
from architectures.entropy_bottleneck import EntropyBottleneck
from architectures.exit_heads import ExitHead
from architectures.gaussian import GaussianEncoder, make_gaussian
from architectures.macs import count_macs, count_params
from architectures.multi_exit import MultiExitNetwork
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
from architectures.switchable import SwitchableBatchNorm2d, select, switchable

__all__ = [
    "Backbone",
    "BitErrors",
    "Bottleneck",
    "CutError",
    "CutPoint",
    "DevicePart",
    "EntropyBottleneck",
    "ExitHead",
    "GaussianEncoder",
    "GaussianNoise",
    "MultiExitNetwork",
    "NodeGraph",
    "PacketLoss",
    "Partition",
    "ServerPart",
    "SplitNetwork",
    "Stages",
    "SwitchableBatchNorm2d",
    "UniformQuantizer",
    "WholePart",
    "build_bottleneck",
    "build_channel",
    "calibrate_range",
    "count_macs",
    "count_params",
    "create_backbone",
    "cut",
    "cut_points",
    "export_parts",
    "make_gaussian",
    "partition",
    "profile",
    "recalibrate_batchnorm",
    "select",
    "spread",
    "switchable",
    "trace_graph",
]
