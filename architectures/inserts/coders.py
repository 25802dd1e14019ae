"""Encoders and decoders generated to fit a cut: what a device sends and how a server reads it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures.backbones.norms import norm_of
from cleave.architectures.inserts.gaussian import make_gaussian
from cleave.architectures.naming import whole_number

MAP_LAYOUTS = ("NCHW", "NHWC")
VECTOR_LAYOUTS = ("NLC", "NC")
FORMS = ("replace", "insert")


class Coders(NamedTuple):
    """An encoder (device), a decoder (server) and the per-sample shape of the representation between them."""

    encoder: nn.Module
    decoder: nn.Module
    shape: tuple[int, ...]


class Permute(nn.Module):
    """Reorder dimensions, so that channels-last maps meet convolutions; (B, H, W, C) or (B, C, H, W)."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with its dimensions in the new order."""
        return x.permute(self.order).contiguous()

    def extra_repr(self) -> str:
        """Show the order in the printed module."""
        return ", ".join(map(str, self.order))


class Resize(nn.Module):
    """Bring a map (B, C, H, W) to rows × columns: nearest neighbours upwards, average pooling downwards."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.size = (rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map in its new size."""
        if x.shape[-2] >= self.size[0] and x.shape[-1] >= self.size[1]:
            return F.adaptive_avg_pool2d(x, self.size)
        return F.interpolate(x, size=self.size, mode="nearest")

    def extra_repr(self) -> str:
        """Show the size in the printed module."""
        return f"{self.size[0]}x{self.size[1]}"


def build_bottleneck(
    source: tuple[int, ...],
    target: tuple[int, ...],
    layout: str,
    *,
    form: str = "replace",
    channels: int = 8,
    stride: int | None = None,
    kernel: int = 3,
    width: int = 64,
    depth: int = 1,
    decoder_width: int | None = None,
    variance: str | float | None = None,
    sampled: bool = False,
    norm: str = "batch",
) -> Coders:
    """Generate the encoder and decoder of a bottleneck.

    The encoder is a chain of convolution, norm and ReLU that halves (or divides by a larger prime) the map until
    ``stride`` is reached, then ``depth`` convolutions there, then a projection to ``channels``. The decoder brings the
    representation to the size of the cut and refines it to the cut's channels, as in the bottlenecks of
    Matsubara et al. ("Neural Compression and Filtering for Edge-assisted Real-time Object Detection", 2020). Token
    features and flat vectors get one linear layer on each side.

    Args:
        source: Per-sample shape of the encoder's input: the image (C, H, W) where the head is replaced, the feature at
            the cut in its own layout where the bottleneck is inserted.
        target: Per-sample shape of the feature at the cut, in ``layout``.
        layout: Layout at the cut: ``NCHW``, ``NHWC`` (Swin), ``NLC`` (ViT) or ``NC``.
        form: ``replace`` or ``insert``.
        channels: Channels of the representation.
        stride: Spatial stride of the representation against the encoder's input; ``None`` keeps the cut's own size.
        kernel: Odd kernel size of the convolutions.
        width: Channels of the hidden layers.
        depth: Convolutions at the representation's resolution before the projection, at least 0.
        decoder_width: Channels of the decoder's hidden layers, which the server runs; ``None`` takes ``width``.
        variance: ``learned`` or a number makes the encoder stochastic, see :func:`make_gaussian`.
        sampled: Whether a stochastic encoder's representation is drawn in inference too.
        norm: ``batch``, or ``group`` for GroupNorm, which DP-SGD needs.

    Raises:
        ValueError: An argument is out of range, or does not apply at a cut of this layout.

    Example:
        >>> build_bottleneck((3, 32, 32), (32, 16, 16), "NCHW", channels=8, stride=4).shape
        (8, 8, 8)
    """
    _check(form, channels, stride, kernel, width, depth, decoder_width)
    if layout in VECTOR_LAYOUTS:
        if (kernel, width, depth, decoder_width, norm) != (3, 64, 1, None, "batch"):
            raise ValueError(
                f"kernel, width, depth, decoder_width and norm have no meaning for {layout} features, which take "
                f"a linear one; got {kernel}, {width}, {depth}, {decoder_width}, {norm}: leave them out"
            )
        return _stochastic(_linear(target, layout, form, channels, stride), variance, sampled)
    if layout not in MAP_LAYOUTS:
        raise ValueError(
            f"no bottleneck fits the feature {target} of layout {layout!r}; cut where it is one of "
            f"{', '.join((*MAP_LAYOUTS, *VECTOR_LAYOUTS))}"
        )
    last = layout == "NHWC"
    rows, columns, features = target if last else (target[1], target[2], target[0])
    inserted = form == "insert"
    in_channels, in_rows, in_columns = (features, rows, columns) if inserted else source
    if stride is None:
        stride = max(1, round(min(in_rows / rows, in_columns / columns)))
    if stride > min(in_rows, in_columns):
        raise ValueError(
            f"stride={stride} exceeds the encoder's input of {in_rows}x{in_columns} pixels; "
            f"use at most {min(in_rows, in_columns)}"
        )
    encoder = _encoder(in_channels, channels, stride, kernel, width, depth, norm)
    if last and inserted:
        encoder.insert(0, Permute(0, 3, 1, 2))
    shape = _shape_after(
        encoder, (rows, columns, features) if last and inserted else (in_channels, in_rows, in_columns)
    )
    decoder = _decoder(channels, (rows, columns), shape[1:], features, kernel, decoder_width or width, norm)
    if last:
        decoder.append(Permute(0, 2, 3, 1))
    return _stochastic(Coders(encoder, decoder, shape), variance, sampled)


def _stochastic(coders: Coders, variance: str | float | None, sampled: bool) -> Coders:
    if variance is None:
        if sampled:
            raise ValueError("sampled=True draws from a stochastic encoder; give variance, learned or a number")
        return coders
    return coders._replace(encoder=make_gaussian(coders.encoder, variance, sampled))


def _check(
    form: str, channels: int, stride: int | None, kernel: int, width: int, depth: int, decoder_width: int | None
) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    for name, value, least in (
        ("channels", channels, 1),
        ("stride", 1 if stride is None else stride, 1),
        ("width", width, 1),
        ("decoder_width", 1 if decoder_width is None else decoder_width, 1),
        ("depth", depth, 0),
        ("kernel", kernel, 1),
    ):
        whole_number(name, value, least)
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}; use {kernel - 1} or {kernel + 1}")


def _linear(target: tuple[int, ...], layout: str, form: str, channels: int, stride: int | None) -> Coders:
    if form != "insert":
        raise ValueError(
            f"the feature {target} at this cut is {layout}, which has no map an image encoder could produce; "
            "use form=insert, or cut at a convolutional layer"
        )
    if stride not in (None, 1):
        raise ValueError(f"stride={stride} has no meaning for {layout} features; leave it null")
    features = target[-1]
    return Coders(nn.Linear(features, channels), nn.Linear(channels, features), (*target[:-1], channels))


def conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1, norm: str = "batch") -> list[nn.Module]:
    """Return convolution, norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, norm_of(norm, outputs), nn.ReLU(inplace=True)]


def _encoder(inputs: int, outputs: int, stride: int, kernel: int, width: int, depth: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for factor in _prime_factors(stride):
        # A kernel narrower than its stride would skip pixels.
        layers += conv_block(inputs, width, max(kernel, factor + 1 - factor % 2), factor, norm)
        inputs = width
    for _ in range(depth):
        layers += conv_block(inputs, width, kernel, norm=norm)
        inputs = width
    return nn.Sequential(*layers, nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))


def _decoder(
    inputs: int, size: tuple[int, int], coded: tuple[int, ...], outputs: int, kernel: int, width: int, norm: str
) -> nn.Sequential:
    layers = conv_block(inputs, width, kernel, norm=norm)
    if coded != size:
        layers.append(Resize(*size))
    layers += conv_block(width, width, kernel, norm=norm)
    return nn.Sequential(*layers, nn.Conv2d(width, outputs, kernel, padding=kernel // 2))


def _prime_factors(number: int) -> list[int]:
    factors = []
    for divisor in range(2, math.isqrt(number) + 1):
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
    return [*factors, number] if number > 1 else factors


@torch.no_grad()
def _shape_after(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    module.eval()  # a probe must not move BatchNorm's statistics
    outputs = module(torch.zeros(1, *shape))
    module.train()
    return tuple(outputs.shape[1:])
