"""A feature as a link sees it: a map of channels, whatever the layout of its network."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from cleave.architectures.inserts.coders import MAP_LAYOUTS, VECTOR_LAYOUTS

LAYOUTS = (*MAP_LAYOUTS, *VECTOR_LAYOUTS)


@dataclasses.dataclass(frozen=True)
class Feature:
    """What passes between two blocks.

    Args:
        shape: Per-sample shape.
        layout: ``NCHW``, ``NHWC`` (Swin), ``NLC`` (ViT) or ``NC``.
        size: Rows and columns of the map; a vector is a map of one cell.
        prefix: Tokens in front of the map, such as a class token.
        signed: Whether it has values below zero, which no ReLU gives.
        owner: Whose network it is of, ``local`` or ``host``.
    """

    shape: tuple[int, ...]
    layout: str
    size: tuple[int, int]
    prefix: int = 0
    signed: bool = True
    owner: str = ""

    @property
    def channels(self) -> int:
        """Channels of the map."""
        return self.shape[0] if self.layout in ("NCHW", "NC") else self.shape[-1]

    def to_map(self, x: Tensor) -> Tensor:
        """Return a feature as a map (B, C, H, W), without the tokens in front of it."""
        if self.layout == "NCHW":
            return x
        if self.layout == "NHWC":
            return x.permute(0, 3, 1, 2).contiguous()
        if self.layout == "NC":
            return x[:, :, None, None]
        return x[:, self.prefix :].transpose(1, 2).unflatten(2, self.size).contiguous()

    def from_map(self, x: Tensor) -> Tensor:
        """Return a map (B, C, H, W) in the feature's layout, still without the tokens in front of it."""
        if self.layout == "NCHW":
            return x
        if self.layout == "NHWC":
            return x.permute(0, 2, 3, 1).contiguous()
        return x.flatten(1) if self.layout == "NC" else x.flatten(2).transpose(1, 2).contiguous()


def describe_feature(
    value: Tensor, layout: str, image: tuple[int, ...], owner: str, name: str, prefix: int | None = None
) -> Feature:
    """Describe the feature of some samples.

    Args:
        value: The feature (B, …).
        layout: Its layout.
        image: Per-sample shape of the network's input, of whose form the grid of tokens is.
        owner: Whose network it is of.
        name: Its name there, for messages.
        prefix: Tokens in front of a grid of tokens; ``None``: the fewest that leave a grid of the image's form.

    Raises:
        ValueError: No link fits it.
    """
    shape, where = tuple(value.shape[1:]), f"{owner}/{name}"
    signed = not value.is_floating_point() or bool((value < 0).any())
    if layout not in LAYOUTS or not value.is_floating_point():
        raise ValueError(
            f"no link fits the feature of {where}, which is {shape} of layout {layout!r}; let the path leave or enter "
            f"where the layout is one of {', '.join(LAYOUTS)}"
        )
    if layout == "NLC":
        size, prefix = _grid(shape[0], image, where, prefix)
        return Feature(shape, layout, size, prefix, signed, owner)
    rows, columns = (1, 1) if layout == "NC" else shape[1:] if layout == "NCHW" else shape[:2]
    return Feature(shape, layout, (rows, columns), 0, signed, owner)


def _grid(length: int, image: tuple[int, ...], where: str, prefix: int | None) -> tuple[tuple[int, int], int]:
    """Return rows and columns of a grid of tokens, and how many tokens stand in front of it."""
    rows, columns = image[-2:] if len(image) == 3 else (1, 1)
    shared = math.gcd(rows, columns)
    rows, columns = rows // shared, columns // shared
    for tokens in range(length) if prefix is None else (prefix,):
        times = math.isqrt(max(0, length - tokens) // (rows * columns))
        if times and times * times * rows * columns == length - tokens:
            return (times * rows, times * columns), tokens
    said = "" if prefix is None else f" and prefix={prefix}"
    raise ValueError(
        f"no link fits the feature of {where}: {length} tokens{said} leave no grid of the form {rows}:{columns} of the "
        "image; say by prefix how many tokens stand in front of the grid"
    )


def prefixed(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Return tokens (B, L, C) with the same others (P, C) in front of each sample's."""
    return x if tokens is None else torch.cat([tokens.to(x.dtype).expand(len(x), -1, -1), x], 1)
