"""ResNets for 32-pixel images: three stages of 16, 32 and 64 channels with parameter-free shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures.backbones.norms import norm_of


class SubsampleShortcut(nn.Module):
    """Option-A shortcut: every second row and column, with zero channels padded evenly before and after.

    Args:
        extra_channels: Number of channels to add; even.
    """

    def __init__(self, extra_channels: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C + extra_channels, ceil(H/2), ceil(W/2))."""
        before = self.extra_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.extra_channels - before))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a norm behind each beside a shortcut: ``relu(F(x) + shortcut(x))``."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_of(norm, channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm_of(norm, channels)
        self.shortcut = SubsampleShortcut(channels - in_channels) if stride != 1 else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, ceil(H/stride), ceil(W/stride))."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for CIFAR with option-A shortcuts (He et al. 2016, "Deep residual learning", section 4.2).

    Module names are those of the public CIFAR-10 weight files (``conv1``, ``bn1``, ``layer1`` … ``layer3``,
    ``linear``), so that these load strictly. Global average pooling makes it take any image size.

    Args:
        depth: Weighted layers: 6n + 2 with n blocks a stage, such as 20, 32, 44, 56 or 110.
        num_classes: Size of the output.
        in_channels: Channels of the input image.
        norm: ``batch``, or ``group`` for GroupNorm under the same names, which DP-SGD needs.

    Raises:
        ValueError: ``depth`` is not 6n + 2, or there is no such norm.

    Example:
        >>> CifarResNet(20)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, norm: str = "batch") -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6 != 0:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 26, 32, …), got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = norm_of(norm, 16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, 1, norm)
        self.layer2 = self._stage(16, 32, blocks, 2, norm)
        self.layer3 = self._stage(32, 64, blocks, 2, norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int, norm: str) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, norm)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1, norm) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, in_channels, H, W) to logits (B, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))
