"""Networks for 32-pixel images by name. They end in global average pooling and take any image size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from cleave.architectures.backbones.zoo.alexnet import CifarAlexNet
from cleave.architectures.backbones.zoo.mobilenet import CifarMobileNet
from cleave.architectures.backbones.zoo.resnet import CifarResNet
from cleave.architectures.backbones.zoo.vgg import CifarVGG

#: Constructors by name; each takes ``num_classes``, ``in_channels`` and its own keyword arguments.
CIFAR_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": partial(CifarResNet, 20),
    "resnet32": partial(CifarResNet, 32),
    "resnet44": partial(CifarResNet, 44),
    "resnet56": partial(CifarResNet, 56),
    "resnet110": partial(CifarResNet, 110),
    "alexnet": CifarAlexNet,
    "vgg11_bn": partial(CifarVGG, 11),
    "vgg16_bn": partial(CifarVGG, 16),
    "mobilenet": CifarMobileNet,
}

__all__ = ["CIFAR_NETWORKS", "CifarAlexNet", "CifarMobileNet", "CifarResNet", "CifarVGG"]
