"""Plain networks: backbones, cutting, bottlenecks, quantisers and split networks."""

from cleave.architectures.backbones import Backbone, create_backbone
from cleave.architectures.costs import profile
from cleave.architectures.cutting.stages import (
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
from cleave.architectures.inserts.bottleneck import Bottleneck, build_bottleneck
from cleave.architectures.inserts.calibration import calibrate_range
from cleave.architectures.inserts.channels import BitErrors, GaussianNoise, PacketLoss, build_channel
from cleave.architectures.inserts.entropy_bottleneck import EntropyBottleneck
from cleave.architectures.inserts.exit_heads import ExitHead
from cleave.architectures.inserts.gaussian import GaussianEncoder, make_gaussian
from cleave.architectures.inserts.quantizer import UniformQuantizer
from cleave.architectures.inserts.recalibrate import recalibrate_batchnorm
from cleave.architectures.inserts.switchable import SwitchableBatchNorm2d, select, switchable
from cleave.architectures.macs import count_macs, count_params
from cleave.architectures.multi_exit import MultiExitNetwork
from cleave.architectures.partitions import DevicePart, ServerPart, WholePart, export_parts
from cleave.architectures.split import SplitNetwork

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
