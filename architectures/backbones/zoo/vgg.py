"""VGG with batch normalisation for 32-pixel images: the published convolutions and one linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Channels of the 3×3 convolutions in each of the five stages (Simonyan & Zisserman 2015, table 1, columns A and D).
CHANNELS = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class CifarVGG(nn.Module):
    """VGG-11 or VGG-16 with batch normalisation (Simonyan & Zisserman 2015; for small images Liu & Deng 2015).

    Each of five stages ends in 2×2 pooling, which leaves one pixel of a 32-pixel image; global average pooling and one
    linear layer stand for the fully connected ones. Layers in ``features`` are numbered as in torchvision's VGG.
    Pooling rounds up, so that any image size passes.

    Args:
        depth: 11 or 16.
        num_classes: Size of the output.
        in_channels: Channels of the input image.
        dropout: Probability of dropping a feature before the classifier.

    Raises:
        ValueError: ``depth`` is neither 11 nor 16.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        if depth not in CHANNELS:
            raise ValueError(f"depth must be one of {sorted(CHANNELS)}, got {depth}")
        layers: list[nn.Module] = []
        previous = in_channels
        for stage in CHANNELS[depth]:
            for channels in stage:
                layers += [nn.Conv2d(previous, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
                previous = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(previous, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, in_channels, H, W) to logits (B, num_classes)."""
        x = torch.flatten(self.pool(self.features(x)), 1)
        return self.classifier(self.dropout(x))
