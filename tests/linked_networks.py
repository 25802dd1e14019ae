"""A pair of tiny networks of six blocks each, of other architecture and image size, and paths through them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from cleave.architectures import Blocks, cut_blocks

CLASSES = 4
LOCAL_CHANNELS, HOST_CHANNELS = (3, 3, 4, 4, 5, 5), (2, 4, 3, 5, 4, 6)
LOCAL_SAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HOST_SAMPLE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Local(nn.Module):
    """Six convolutions with BatchNorm; the ReLU of each works in place. ``b0`` ends with the tensor of ``b0.2``."""

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for i, channels in enumerate(LOCAL_CHANNELS):
            conv = nn.Conv2d(inputs, channels, 3, 2 if i in (2, 4) else 1, 1)
            self.add_module(f"b{i}", nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)))
            inputs = channels
        self.fc = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b5(self.b4(self.b3(self.b2(self.b1(self.b0(x))))))
        return self.fc(x.mean((2, 3)))


class Host(nn.Module):
    """Six blocks that begin in place on what they read, of five classes of its own."""

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for i, channels in enumerate(HOST_CHANNELS):
            conv = nn.Conv2d(inputs, channels, 3, 2 if i in (1, 3) else 1, 1)
            self.add_module(f"layer{i}", nn.Sequential(nn.Hardswish(inplace=True), conv, nn.BatchNorm2d(channels)))
            inputs = channels
        self.head = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer0(x + 0)
        x = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.head(x.mean((2, 3)))


LOCAL_BLOCKS = [f"b{i}" for i in range(6)]
HOST_BLOCKS = [f"layer{i}" for i in range(6)]


def seeded(kind: type[nn.Module]) -> nn.Module:
    """Return a network whose weights are always the same, its statistics those of a batch."""
    torch.manual_seed(0)
    network = kind()
    network.train()
    with torch.no_grad():
        network(torch.randn(8, 3, 12, 12))
    return network.eval()


@functools.cache
def local_blocks() -> Blocks:
    return cut_blocks(seeded(Local), LOCAL_SAMPLE, LOCAL_BLOCKS, "local")


@functools.cache
def host_blocks() -> Blocks:
    return cut_blocks(seeded(Host), HOST_SAMPLE, HOST_BLOCKS, "host")


def images(count: int = 4, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 4) -> Tensor:
    return torch.arange(count) % CLASSES
