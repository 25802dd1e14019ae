"""Classifiers by which an adversary tells an attribute of images from what a device sends, in three families."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cleave.architectures.attacking.decoders import MOST_WEIGHTS, dense, standards
from cleave.architectures.naming import did_you_mean

WIDTH = 64


class AttributeClassifier(nn.Module):
    """The shares of the attributes plus what a network makes of the standardised payload.

    The network begins at 0, so that an adversary who learns nothing answers the commonest attribute, which is the best
    that one can do without a payload.

    Args:
        network: Maps payloads (B, ...) to logits (B, attributes); its last layer is set to 0.
        payloads: What is sent of training images, (N, ...).
        attributes: Their attributes, int64 (N,).
        count: Number of attributes.

    Shape:
        - input: (B, ...), payloads.
        - output: (B, count), logits.
    """

    center: Tensor
    scale: Tensor
    prior: Tensor

    def __init__(self, network: nn.Sequential, payloads: Tensor, attributes: Tensor, count: int) -> None:
        super().__init__()
        self.network = network
        last = network[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        center, scale = standards(payloads)
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)
        shares = torch.bincount(attributes, minlength=count).float().clamp_min(0.5) / len(attributes)
        self.register_buffer("prior", shares.log())

    def forward(self, payloads: Tensor) -> Tensor:
        """Return the logits of the attributes."""
        return self.prior + self.network((payloads.float() - self.center) * self.scale)


def attribute_classifier(family: str, payloads: Tensor, attributes: Tensor, count: int) -> AttributeClassifier:
    """Build a classifier of a family.

    ``linear`` is one linear layer, ``mlp`` has one hidden layer, ``conv`` two convolutions before it; payloads that are
    no maps give ``conv`` nothing to slide over, and it is the same as ``mlp``.

    Args:
        family: ``linear``, ``mlp`` or ``conv``.
        payloads: What is sent of the adversary's training images, (N, ...).
        attributes: Their attributes, int64 (N,).
        count: Number of attributes.

    Raises:
        ValueError: There is no such family.

    Example:
        >>> found = attribute_classifier("mlp", torch.rand(6, 4, 2, 2), torch.tensor([0, 1, 1, 0, 1, 1]), 2)
        >>> found(torch.rand(3, 4, 2, 2)).shape
        torch.Size([3, 2])
    """
    if family not in CLASSIFIERS:
        near = did_you_mean(str(family), CLASSIFIERS)
        raise ValueError(f"family must be one of {', '.join(CLASSIFIERS)}, got {family!r}.{near}")
    network = CLASSIFIERS[family](payloads.shape[1:], count)
    return AttributeClassifier(network, payloads, attributes, count)


def _linear(sent: Sequence[int], count: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(sent), count))


def _mlp(sent: Sequence[int], count: int) -> nn.Sequential:
    hidden = 2 * WIDTH
    return nn.Sequential(
        nn.Flatten(),
        dense(math.prod(sent), hidden, MOST_WEIGHTS),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, count),
    )


def _conv(sent: Sequence[int], count: int) -> nn.Sequential:
    if len(sent) != 3:
        return _mlp(sent, count)
    layers: list[nn.Module] = []
    for inputs in (sent[0], WIDTH):
        layers += [nn.Conv2d(inputs, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    side = (min(4, sent[1]), min(4, sent[2]))
    pool = nn.AdaptiveAvgPool2d(side)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(WIDTH * side[0] * side[1], count))


CLASSIFIERS: dict[str, Callable[[Sequence[int], int], nn.Sequential]] = {"linear": _linear, "mlp": _mlp, "conv": _conv}
