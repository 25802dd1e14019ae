"""Plain networks: backbones, cutting, inserts, and the network that is made of them."""

from cleave.architectures.attacking.decoders import decoder
from cleave.architectures.backbones import Backbone, create_backbone
from cleave.architectures.builders import multi_exit_network, split_network, staged_network
from cleave.architectures.costs import Cost
from cleave.architectures.cutting import (
    CutError,
    CutPoint,
    GraphNode,
    NodeGraph,
    Partition,
    Stages,
    cut,
    cut_points,
    partition,
    spread,
    trace_graph,
    visit_nodes,
)
from cleave.architectures.inserts.bottleneck import Bottleneck
from cleave.architectures.inserts.calibrating.calibration import calibrate_range
from cleave.architectures.inserts.calibrating.recalibrate import recalibrate_batchnorm
from cleave.architectures.inserts.channels import BitErrors, Channel, GaussianNoise, PacketLoss
from cleave.architectures.inserts.codecs import entropy_codec, uniform_codec
from cleave.architectures.inserts.coders import Coders, build_bottleneck
from cleave.architectures.inserts.entropy_bottleneck import EntropyBottleneck
from cleave.architectures.inserts.exit_head import ExitHead
from cleave.architectures.inserts.gaussian import GaussianEncoder, make_gaussian
from cleave.architectures.inserts.insert import Half, Halves, Insert, Step
from cleave.architectures.inserts.quantizer import UniformQuantizer, Unquantized
from cleave.architectures.inserts.switchable import SwitchableBatchNorm2d, select, switchable
from cleave.architectures.linking.blocks import Blocks, cut_blocks
from cleave.architectures.linking.feature import Feature
from cleave.architectures.linking.link import Link, build_link
from cleave.architectures.linking.linked import link_blocks, linked_network
from cleave.architectures.linking.path import Path, every_path, read_path
from cleave.architectures.linking.path_costs import PathCosts, path_costs
from cleave.architectures.macs import count_macs, count_params
from cleave.architectures.network.ensemble import GeometricEnsemble
from cleave.architectures.network.staged import StagedNetwork
from cleave.architectures.noise.channel_mask import ChannelMask
from cleave.architectures.noise.guarantee import gaussian_accuracy, gaussian_sigma, laplace_accuracy, laplace_scale
from cleave.architectures.noise.learned import Cloak, Shredder
from cleave.architectures.noise.mechanisms import GaussianMechanism, LaplaceMechanism
from cleave.architectures.noise.noise import LearnedNoise, Noise
from cleave.architectures.noise.nullification import MagnitudeNullification, RandomNullification

__all__ = [
    "Backbone",
    "BitErrors",
    "Blocks",
    "Bottleneck",
    "Channel",
    "ChannelMask",
    "Cloak",
    "Coders",
    "Cost",
    "CutError",
    "CutPoint",
    "EntropyBottleneck",
    "ExitHead",
    "Feature",
    "GaussianEncoder",
    "GaussianMechanism",
    "GaussianNoise",
    "GeometricEnsemble",
    "GraphNode",
    "Half",
    "Halves",
    "Insert",
    "LaplaceMechanism",
    "LearnedNoise",
    "Link",
    "MagnitudeNullification",
    "NodeGraph",
    "Noise",
    "PacketLoss",
    "Partition",
    "Path",
    "PathCosts",
    "RandomNullification",
    "Shredder",
    "StagedNetwork",
    "Stages",
    "Step",
    "SwitchableBatchNorm2d",
    "UniformQuantizer",
    "Unquantized",
    "build_bottleneck",
    "build_link",
    "calibrate_range",
    "count_macs",
    "count_params",
    "create_backbone",
    "cut",
    "cut_blocks",
    "cut_points",
    "decoder",
    "entropy_codec",
    "every_path",
    "gaussian_accuracy",
    "gaussian_sigma",
    "laplace_accuracy",
    "laplace_scale",
    "link_blocks",
    "linked_network",
    "make_gaussian",
    "multi_exit_network",
    "partition",
    "path_costs",
    "read_path",
    "recalibrate_batchnorm",
    "select",
    "split_network",
    "spread",
    "staged_network",
    "switchable",
    "trace_graph",
    "uniform_codec",
    "visit_nodes",
]
