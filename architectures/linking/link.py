"""The link: a small trained insert that makes of one network's feature what another network's block reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures.inserts.insert import IN, OUT, Insert, Step
from cleave.architectures.linking.feature import Feature, prefixed
from cleave.architectures.modes import evaluating
from cleave.architectures.naming import did_you_mean, whole_number

LINKS, LOCAL, HOST = "links", "local", "host"
STYLES = ("full", "reduced", "separable", "low_rank")
NORMS = ("batch", "group", "none")
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "none": nn.Identity,
}
DOWN, UP = ("stride", "max", "average"), ("nearest", "bilinear")
NARROW = 25
"""Channels between the two convolutions of the paper's reduced-25."""


class Link(Insert):
    """A link of Coordinated Deep Neural Networks (CoDE, 2023 and 2024): it fits a feature to the block that follows.

    Both links of a cross-connection live on the host, that of a skip-connection on the local side.

    Args:
        module: Maps features of the source to features of the target, each in its own layout.
        source: What reaches it.
        target: What it stands for.
        owner: Who holds it, ``local`` or ``host``.
        stands_for: Name of the feature that it stands for, such as ``local/layer2``.

    Raises:
        ValueError: The module gives another shape than that of the target, or has nothing to learn.
    """

    kind = "link"

    def __init__(self, module: nn.Module, source: Feature, target: Feature, owner: str, stands_for: str) -> None:
        super().__init__()
        self.module = module
        self.source, self.target = source, target
        self.owner = owner
        self.stands_for = stands_for
        if not any(weight.requires_grad for weight in module.parameters()):
            raise ValueError(
                f"the link that stands for {stands_for} has nothing to learn: {type(module).__name__} has no trainable "
                "parameters; give links a style, or a module that has some"
            )
        with torch.no_grad(), evaluating(module):
            made = module(torch.zeros(2, *source.shape, device=next(module.parameters()).device))
        if tuple(made.shape[1:]) != target.shape:
            raise ValueError(
                f"the link that stands for {stands_for} must make {target.shape} of {source.shape}, but makes "
                f"{tuple(made.shape[1:])}"
            )

    def steps(self) -> list[Step]:
        """Return its one computation; it draws nothing."""
        return [Step("__call__", (IN,), (OUT,), (LINKS,), kind=self.kind)]

    def parts(self) -> dict[str, nn.Module]:
        """Return itself, one of the ``links``."""
        return {LINKS: self}

    def forward(self, x: Tensor) -> Tensor:
        """Map the feature that arrives to the one that the next block reads."""
        return self.module(x)


class Convolutions(nn.Module):
    """Convolutions between two features: to a map → convolve → resize → to the target's layout.

    Tokens in front of the source's map are dropped, and those in front of the target's are learned.

    Args:
        source: What it reads.
        target: What it makes.
        body: Maps (B, channels, rows, columns) of the source to the target's channels.
        up: How a map that is too small is enlarged, ``nearest`` or ``bilinear``.
    """

    def __init__(self, source: Feature, target: Feature, body: nn.Module, up: str) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.body = body
        self.up = up
        self.prefix = nn.Parameter(0.02 * torch.randn(target.prefix, target.channels)) if target.prefix else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature in its new form."""
        x = self.body(self.source.to_map(x))
        if tuple(x.shape[-2:]) != self.target.size:
            x = F.interpolate(x, size=self.target.size, mode=self.up)
        return prefixed(self.target.from_map(x), self.prefix)

    def extra_repr(self) -> str:
        """Show what it maps to what in the printed module."""
        return f"{self.source.layout} {self.source.shape} -> {self.target.layout} {self.target.shape}, up={self.up}"


def build_link(
    source: Feature,
    target: Feature,
    *,
    style: str = "full",
    channels: int | None = None,
    kernel: int = 3,
    norm: str = "batch",
    activation: str = "relu",
    down: str | None = None,
    up: str = "nearest",
) -> nn.Module:
    """Build the convolutions of a link.

    ``full`` is the paper's one convolution that fits the sizes, and ``reduced`` its two through few channels; the paper
    gives neither normalisation nor activation. ``separable`` and ``low_rank`` are ours.

    Args:
        source: What it reads.
        target: What it makes.
        style: ``full``: one convolution; ``reduced``: two through few channels; ``separable``: one of each channel by
            itself and one of a single cell; ``low_rank``: two through few channels with nothing between them, a
            convolution of low rank.
        channels: Channels between two convolutions, of ``reduced`` and ``low_rank``; ``None``: 25, as in the paper.
        kernel: Odd kernel size.
        norm: ``batch``, ``group`` or ``none``, behind each convolution.
        activation: ``relu``, ``gelu``, ``hardswish`` or ``none``, behind the norm; the last is left out where the
            feature that the link stands for has negative values.
        down: How a larger map is shrunk: by the ``stride`` of the convolution, or by ``max`` or ``average`` pooling in
            front of it; ``None``: by ``max`` on a reduced skip-connection, as in the paper, else by the ``stride``.
        up: How a smaller map is enlarged, behind the convolutions: ``nearest`` or ``bilinear``.

    Raises:
        ValueError: An argument is out of range.
    """
    if down is None:
        down = "max" if style == "reduced" and source.owner == target.owner != "" else "stride"
    _check(style, channels, kernel, norm, activation, down, up)
    size = tuple(min(have, want) for have, want in zip(source.size, target.size, strict=True))
    layers: list[nn.Module] = []
    stride: tuple[int, ...] = (1, 1)
    if size != source.size and down == "stride":
        stride = tuple(min(have // want, kernel) for have, want in zip(source.size, size, strict=True))
    elif size != source.size:
        layers.append((nn.AdaptiveMaxPool2d if down == "max" else nn.AdaptiveAvgPool2d)(size))
    narrow = channels or NARROW
    last = "none" if target.signed else activation
    wide, out, plain = source.channels, target.channels, ("none", "none")
    if style == "full":
        layers += _conv(wide, out, kernel, stride, norm, last)
    elif style == "reduced":
        layers += _conv(wide, narrow, kernel, stride, norm, activation) + _conv(narrow, out, kernel, (1, 1), norm, last)
    elif style == "separable":
        layers += _conv(wide, wide, kernel, stride, norm, activation, groups=wide)
        layers += _conv(wide, out, 1, (1, 1), norm, last)
    else:
        layers += _conv(wide, narrow, kernel, stride, *plain) + _conv(narrow, out, 1, (1, 1), norm, last)
    if size != source.size and down == "stride":
        layers.append(nn.AdaptiveAvgPool2d(size))  # where the stride alone does not reach it
    return Convolutions(source, target, nn.Sequential(*layers), up)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: tuple[int, ...], norm: str, activation: str, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=norm == "none")  # type: ignore[arg-type]
    found: list[nn.Module] = [conv]
    if norm == "batch":
        found.append(nn.BatchNorm2d(outputs))
    elif norm == "group":
        found.append(nn.GroupNorm(math.gcd(outputs, 8), outputs))
    return found if activation == "none" else [*found, ACTIVATIONS[activation]()]


def _check(style: str, channels: int | None, kernel: int, norm: str, activation: str, down: str, up: str) -> None:
    for name, value, known in (
        ("style", style, STYLES),
        ("norm", norm, NORMS),
        ("activation", activation, tuple(ACTIVATIONS)),
        ("down", down, DOWN),
        ("up", up, UP),
    ):
        if value not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}, got {value!r}.{did_you_mean(str(value), known)}"
            )
    if channels is not None:
        whole_number("channels", channels)
        if style not in ("reduced", "low_rank"):
            raise ValueError(
                f"channels={channels} has no meaning for style={style}; take style=reduced or low_rank, or leave it out"
            )
    if whole_number("kernel", kernel) % 2 == 0:
        raise ValueError(f"kernel must be odd, so that the map keeps its size, got {kernel}")


def make_link(
    settings: Mapping[str, Any] | Callable[..., nn.Module] | None,
    source: Feature,
    target: Feature,
    owner: str,
    stands_for: str,
) -> Link:
    """Return a link by the arguments of :func:`build_link`, or by what is called in its place with both features."""
    if callable(settings):
        return Link(settings(source, target), source, target, owner, stands_for)
    return Link(build_link(source, target, **(settings or {})), source, target, owner, stands_for)
