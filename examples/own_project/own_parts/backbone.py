"""A backbone: any module that maps images (B, C, H, W) to logits (B, num_classes)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class StripeNet(nn.Sequential):
    """A small network for grey or colour pictures of any size.

    Args:
        num_classes: Number of classes, which Cleave passes on from the data.
        in_channels: Channels of a picture, which Cleave passes on too.
        width: Channels of the first stage; the second has twice as many.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 8) -> None:
        def stage(inputs: int, outputs: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes))
        stages = [("stage1", stage(in_channels, width)), ("stage2", stage(width, 2 * width)), ("head", head)]
        super().__init__(OrderedDict(stages))
