"""AlexNet for 32-pixel images: the five convolutions with a small stem and one linear classifier."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CHANNELS = (64, 192, 384, 256)


class CifarAlexNet(nn.Module):
    """AlexNet (Krizhevsky et al. 2012; channels of the one-tower form of Krizhevsky 2014) for 32-pixel images.

    The 11×11, stride-4 stem becomes 5×5 with stride 1, pooling is 2×2, and global average pooling with one linear
    layer stands for the three fully connected ones. Pooling rounds up, so that any image size passes.

    Args:
        num_classes: Size of the output.
        in_channels: Channels of the input image.
        dropout: Probability of dropping a feature before the classifier.
        width: Factor on the channels of every convolution; at 1, an image of 32 pixels takes 220 million MACs.

    Raises:
        ValueError: ``width`` is not a positive number.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.5, width: float = 1.0) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < math.inf:
            raise ValueError(f"width must be a positive number, got {width!r}")
        first, second, third, last = (max(1, round(width * channels)) for channels in CHANNELS)
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, first, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(second, third, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(third, last, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(last, last, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, in_channels, H, W) to logits (B, num_classes)."""
        x = torch.flatten(self.pool(self.features(x)), 1)
        return self.classifier(self.dropout(x))
