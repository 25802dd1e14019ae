"""Graphs of networks, traced once and kept as JSON, and the machines of conf/machine."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cleave.architectures import GraphNode, NodeGraph, create_backbone, trace_graph
from cleave.planning import Machine

CONF = Path(__file__).resolve().parents[2] / "conf/machine"
NETWORKS = (
    "torchvision/resnet101", "torchvision/vgg16", "torchvision/googlenet", "torchvision/densenet121",
    "torchvision/efficientnet_b0", "torchvision/vit_b_16", "timm/resnet101", "timm/vgg16", "timm/inception_v3",
    "timm/densenet121", "timm/efficientnet_b0", "timm/vit_base_patch16_224",
)  # fmt: skip


def machine(name: str) -> Machine:
    return instantiate(OmegaConf.load(CONF / f"{name}.yaml"))


def graph_of(name: str, cache: Path) -> tuple[NodeGraph, float | None]:
    """Return a network's graph, and the CPU's seconds of tracing it where it is not kept yet."""
    file = cache / f"{name.replace('/', '_')}.json"
    if file.exists():
        values = json.loads(file.read_text())
        nodes = tuple(
            GraphNode(**{**each, "inputs": tuple(each["inputs"]), "shape": each["shape"] and tuple(each["shape"])})
            for each in values["nodes"]
        )
        return NodeGraph(nodes, tuple(values["outputs"]), tuple(values["input_shape"])), None
    source, _, model = name.partition("/")
    backbone = create_backbone(source, model, num_classes=1000)
    sample = torch.zeros(1, *backbone.input.shape)
    begin = time.process_time()
    graph = trace_graph(backbone.network, sample)
    seconds = time.process_time() - begin
    cache.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(graph)))
    return graph, seconds
