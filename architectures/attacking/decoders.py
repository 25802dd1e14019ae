"""Decoders that an adversary trains to rebuild images from what a device sends, in three families."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures.naming import did_you_mean

STRENGTHS = {"small": (16, 1), "medium": (32, 1), "large": (64, 2)}
"""Channels and blocks of each strength."""
MOST_WEIGHTS = 2**25
"""Of one linear layer; what would have more becomes two, narrow in the middle."""


class InversionDecoder(nn.Module):
    """The mean image plus what a network makes of the standardised payload.

    The network begins at 0, so that an adversary who learns nothing answers the mean image, which is the best that one
    can do without a payload.

    Args:
        network: Maps payloads (B, ...) to images (B, C, H, W); its last layer may be set to 0.
        payloads: What is sent of training images (N, ...): each element is centred, and scaled by the standard
            deviation of its channel, or of its own where there are no maps.
        mean_image: (C, H, W), from 0 to 1.

    Shape:
        - input: (B, ...), payloads.
        - output: (B, C, H, W), images from 0 to 1 in eval mode; in training not clipped, so that gradients stay.
    """

    center: Tensor
    scale: Tensor
    mean_image: Tensor

    def __init__(self, network: nn.Module, payloads: Tensor, mean_image: Tensor) -> None:
        super().__init__()
        self.network = network
        center, scale = standards(payloads)
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)
        self.register_buffer("mean_image", mean_image.float())

    def forward(self, payloads: Tensor) -> Tensor:
        """Return the images that payloads were made of, as far as it knows."""
        images = self.mean_image + self.network((payloads.float() - self.center) * self.scale)
        return images if self.training else images.clamp(0, 1)


def standards(payloads: Tensor) -> tuple[Tensor, Tensor]:
    """Return what centres payloads (N, ...) and what scales them: an element's mean, and 1 / deviation.

    The deviation is that of an element's channel, or its own where there are no maps.
    """
    payloads = payloads.float()
    center = payloads.mean(0)
    squares = (payloads - center).square().mean(0)
    if squares.ndim == 3:
        squares = squares.mean((1, 2), keepdim=True)
    # What never changes says nothing, and is left at 0.
    return center, torch.where(squares > 1e-12, squares.clamp_min(1e-12).rsqrt(), 0.0)


def inversion_decoder(
    family: str, strength: str, payloads: Tensor, mean_image: Tensor, most_weights: int = MOST_WEIGHTS
) -> InversionDecoder:
    """Build a decoder of a family.

    ``linear`` is one linear layer, ``conv`` a convolutional one that grows maps to the image's size, ``residual`` has
    residual blocks at each size and a skip from the payload to the image. Payloads that are no maps are made into
    small ones by a linear layer.

    Args:
        family: ``linear``, ``conv`` or ``residual``.
        strength: ``small``, ``medium`` or ``large``.
        payloads: What is sent of the adversary's training images, (N, ...).
        mean_image: Mean of these images, (C, H, W), from 0 to 1.
        most_weights: As :data:`MOST_WEIGHTS`.

    Raises:
        ValueError: There is no such family or strength.

    Example:
        >>> decoder = inversion_decoder("conv", "small", torch.rand(5, 4, 2, 2), torch.rand(1, 8, 8))
        >>> decoder(torch.rand(3, 4, 2, 2)).shape
        torch.Size([3, 1, 8, 8])
    """
    network = decoder(payloads.shape[1:], mean_image.shape, family, strength, most_weights)
    return InversionDecoder(network, payloads, mean_image)


def decoder(
    representation: Sequence[int],
    image: Sequence[int],
    family: str = "conv",
    strength: str = "small",
    most_weights: int = MOST_WEIGHTS,
) -> nn.Module:
    """Build the network of a decoder from shapes alone, as one learns beside an encoder; it begins at 0.

    Args:
        representation: Shape of a sample of what is decoded.
        image: (C, H, W).
        family: As of :func:`inversion_decoder`.
        strength: ``small``, ``medium`` or ``large``.
        most_weights: As :data:`MOST_WEIGHTS`.

    Raises:
        ValueError: There is no such family or strength.

    Example:
        >>> decoder((4, 2, 2), (1, 8, 8), "residual")(torch.rand(3, 4, 2, 2)).shape
        torch.Size([3, 1, 8, 8])
    """
    for name, value, known in (("family", family, FAMILIES), ("strength", strength, STRENGTHS)):
        if value not in known:
            near = did_you_mean(str(value), known)
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.{near}")
    return FAMILIES[family](tuple(representation), tuple(image), *STRENGTHS[strength], most_weights)


def dense(inputs: int, outputs: int, most_weights: int, rank: int | None = None) -> nn.Module:
    """Return a linear layer; where it would have too many weights, or of a low rank, two without anything between."""
    if rank is None:
        rank = None if inputs * outputs <= most_weights else max(1, most_weights // (inputs + outputs))
    if rank is None or rank >= min(inputs, outputs):
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))


class _Linear(nn.Module):
    """One linear layer; a weak one of a low rank."""

    def __init__(self, sent: Sequence[int], image: Sequence[int], width: int, blocks: int, most_weights: int) -> None:
        super().__init__()
        self.image = tuple(image)
        rank = None if blocks > 1 else width
        self.layer = dense(math.prod(sent), math.prod(image), most_weights, rank)
        _begin_at_zero(self.layer[-1] if isinstance(self.layer, nn.Sequential) else self.layer)

    def forward(self, payloads: Tensor) -> Tensor:
        return self.layer(payloads.flatten(1)).unflatten(1, self.image)


class _Growing(nn.Module):
    """Convolutions at the payload's size, and at twice that, until the image's is reached."""

    def __init__(
        self,
        sent: Sequence[int],
        image: Sequence[int],
        width: int,
        blocks: int,
        most_weights: int,
        block: Callable[[int], nn.Module],
        skip: bool,
    ) -> None:
        super().__init__()
        self.start, (channels, *size) = _as_maps(sent, image, most_weights)
        self.size = tuple(image[1:])
        body: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), *(block(width) for _ in range(blocks))]
        while size[0] < self.size[0] or size[1] < self.size[1]:
            size = [min(2 * own, max(own, wanted)) for own, wanted in zip(size, self.size, strict=True)]
            body += [nn.Upsample(size=tuple(size), mode="nearest"), *(block(width) for _ in range(blocks))]
        self.body = nn.Sequential(*body, nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Conv2d(width, image[0], 3, padding=1)
        self.skip = nn.Conv2d(channels, image[0], 1) if skip else None
        _begin_at_zero(self.last)
        if self.skip is not None:
            _begin_at_zero(self.skip)

    def forward(self, payloads: Tensor) -> Tensor:
        maps = self.start(payloads)
        images = self._fitted(self.last(self.body(maps)))
        return images if self.skip is None else images + self._fitted(self.skip(maps))

    def _fitted(self, images: Tensor) -> Tensor:
        """Return maps at the image's size, where the payload's are larger or no power of two fits."""
        if images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)


class _Block(nn.Module):
    """Two convolutions beside which the input goes on as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)]
        self.layers = nn.Sequential(*(layer for pair in layers for layer in pair))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _plain(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "linear": _Linear,
    "conv": functools.partial(_Growing, block=_plain, skip=False),
    "residual": functools.partial(_Growing, block=_Block, skip=True),
}


def _as_maps(sent: Sequence[int], image: Sequence[int], most_weights: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return what makes maps of a payload, and their shape; maps stay as they are."""
    if len(sent) == 3:
        return nn.Identity(), (sent[0], sent[1], sent[2])
    shape = (32, math.ceil(image[1] / 4), math.ceil(image[2] / 4))
    return nn.Sequential(
        nn.Flatten(), dense(math.prod(sent), math.prod(shape), most_weights), nn.Unflatten(1, shape)
    ), shape


def _begin_at_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
