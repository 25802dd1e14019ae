"""A tiny multi-exit network and the bundles made of it, shared by tests of architectures and of deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures import MultiExitNetwork, export_parts
from cleave.architectures.exit_partitions import exit_specs
from cleave.deployment import Bundle, ExitPolicy, ImageInput, build_policy, export_bundle

INPUT = ImageInput(height=8, width=8, color_mode="L", mean=(0.4,), std=(0.3,), resize=8)
CLASSES = ("ant", "bee", "cat", "dog")
SPLIT = {"split": "layer2", "bottleneck": {"channels": 3, "width": 8}, "codec": {"bits": 4, "range": "sample"}}
TIERS = ["device", "edge", "cloud"]


class Tiny(nn.Module):
    """Three convolutions; the last two begin with a layer that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.layer2 = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(8, 8, 3, stride=2, padding=1))
        self.layer3 = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def multi_exit(**settings: Any) -> MultiExitNetwork:
    """Exits at layer1 and layer2, of random weights."""
    torch.manual_seed(0)
    arguments = {"at": ["layer1", "layer2"], "heads": {"grid": 2, "width": 4}, **settings}
    return MultiExitNetwork(Tiny(), torch.randn(2, 1, 8, 8), **arguments).eval()


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def middling(network: MultiExitNetwork, kind: str = "confidence", keep: float = 0.5) -> ExitPolicy:
    """A policy by which a share of the samples that reach an exit leaves there."""
    never = build_policy(kind, None, exits=len(network.exit_names))
    scores = never.scores(torch.stack(network.classify(network.reduced(INPUT.normalize(images(64, seed=9))))))
    return never.with_thresholds([float(row.quantile(keep)) for row in scores[:-1]])


def exit_bundle(
    directory: Path, network: MultiExitNetwork, policy: ExitPolicy | None, placements: list[str] | None = None
) -> Bundle:
    parts, codecs = export_parts(network, INPUT, placements)
    specs = exit_specs(network, parts, policy)
    return export_bundle(directory, parts, codecs, INPUT, CLASSES, images(), exits=specs, policy=policy)
