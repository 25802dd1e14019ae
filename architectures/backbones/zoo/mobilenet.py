"""MobileNet (v1) for 32-pixel images: depthwise separable convolutions after a stem with stride 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Output channels and stride of each depthwise separable convolution (Howard et al. 2017, table 1, where the last
# stride is printed as 2 although the map keeps its size). Only the stem's stride of 2 is left out here.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class DepthwiseSeparable(nn.Module):
    """A 3×3 depthwise and a 1×1 pointwise convolution, each with batch normalisation and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, ceil(H/stride), ceil(W/stride))."""
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)))


class CifarMobileNet(nn.Module):
    """MobileNet (Howard et al. 2017) with a stem of stride 1 for 32-pixel images, which end as 2×2.

    Args:
        num_classes: Size of the output.
        in_channels: Channels of the input image.
        width: Width multiplier α of the paper on every layer's channels.

    Raises:
        ValueError: ``width`` is not positive.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width must be positive, got {width}")
        previous = max(1, round(32 * width))
        self.conv1 = nn.Conv2d(in_channels, previous, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(previous)
        self.relu = nn.ReLU()
        blocks = []
        for full_width, stride in BLOCKS:
            channels = max(1, round(full_width * width))
            blocks.append(DepthwiseSeparable(previous, channels, stride))
            previous = channels
        self.layers = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(previous, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, in_channels, H, W) to logits (B, num_classes)."""
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        return self.linear(torch.flatten(self.pool(x), 1))
