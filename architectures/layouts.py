"""Which dimension of a feature holds the channels, found by following it through the operations that ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
# The channels were merged into a dimension before them (tokens mixed as rows): a matrix product then mixes positions.
MERGED = -1
Channel = int | None


class ChannelDims(TorchDispatchMode):
    """Follows the channel dimension of every tensor while it is active.

    A convolution or batch norm puts channels at 1, a matrix product with weights at the end; permutations and reshapes
    move them; everything else keeps the place they have in its operands. Shapes alone could not tell a map of 8 × 8
    positions and 8 channels from its transpose, and many networks take one image size only, so that their response to
    another cannot be asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dims: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def start(self, images: Tensor) -> None:
        """Say that a tensor holds images (B, C, H, W)."""
        self._dims[images] = 1

    def get(self, tensor: Any) -> Channel:
        """Return the channel dimension of a tensor, ``MERGED``, or ``None`` where it is not known."""
        return self._dims.get(tensor) if isinstance(tensor, Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note where the channels of its results are."""
        result = func(*args, **(kwargs or {}))
        rule = _RULES.get(func.overloadpacket)
        for out in result if isinstance(result, tuple | list) else (result,):
            if isinstance(out, Tensor):
                channel = rule(self, args, kwargs or {}, out) if rule else _same_place(self, args, kwargs or {}, out)
                if channel is None:
                    self._dims.pop(out, None)
                else:
                    self._dims[out] = channel
        return result


Rule = Callable[[ChannelDims, Sequence[Any], dict[str, Any], Tensor], Channel]


def _same_place(dims: ChannelDims, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Channel:
    """Elementwise operations, pooling, padding, slices, concatenation: an operand of full size decides."""
    operands = [a for arg in args for a in (arg if isinstance(arg, tuple | list) else (arg,)) if isinstance(a, Tensor)]
    found = [(dims.get(a), a) for a in operands if a.ndim == out.ndim]
    known = [(channel, a) for channel, a in found if channel is not None]
    known.sort(key=lambda pair: (pair[0] == MERGED, pair[1].shape != out.shape))  # stable: the first operand wins
    return known[0][0] if known else None


def _first(_dims: ChannelDims, _args: Sequence[Any], _kwargs: dict[str, Any], out: Tensor) -> Channel:
    """Convolution and batch norm."""
    return 1 if out.ndim >= 2 else None


def _unknown(*_: Any) -> Channel:
    """Attention and products of two activations: channels are spread over heads."""
    return None


def _product(which: int) -> Rule:
    def rule(dims: ChannelDims, args: Sequence[Any], _kwargs: dict[str, Any], out: Tensor) -> Channel:
        """Rows times weights: channels come out last, unless the rows themselves are channels."""
        channel = dims.get(args[which])
        return out.ndim - 1 if channel is None else channel

    return rule


def _layer_norm(dims: ChannelDims, args: Sequence[Any], _kwargs: dict[str, Any], out: Tensor) -> Channel:
    channel = dims.get(args[0])
    one = len(args[1]) == 1 and out.shape == args[0].shape
    return out.ndim - 1 if channel is None and one else channel if out.shape == args[0].shape else None


def _permute(dims: ChannelDims, args: Sequence[Any], _kwargs: dict[str, Any], out: Tensor) -> Channel:
    channel = dims.get(args[0])
    return channel if channel in (None, MERGED) else [d % out.ndim for d in args[1]].index(channel)


def _transpose(dims: ChannelDims, args: Sequence[Any], _kwargs: dict[str, Any], out: Tensor) -> Channel:
    channel = dims.get(args[0])
    first, second = (d % out.ndim for d in args[1:]) if len(args) == 3 else (0, out.ndim - 1)
    return {first: second, second: first}.get(channel, channel) if channel not in (None, MERGED) else channel


def _reshape(dims: ChannelDims, args: Sequence[Any], _kwargs: dict[str, Any], out: Tensor) -> Channel:
    """The dimension of the same length at the same place; merged into another one, or split, the channels are lost."""
    channel, old, new = dims.get(args[0]), tuple(args[0].shape), tuple(out.shape)
    if channel in (None, MERGED):
        return channel
    before, behind = math.prod(old[:channel]), math.prod(old[channel + 1 :])
    for i, length in enumerate(new):
        if length == old[channel] and math.prod(new[:i]) == before:
            return i
    for i, length in enumerate(new):
        inner = math.prod(new[i + 1 :])
        if inner <= behind and behind * old[channel] <= inner * length:
            return i if i == len(new) - 1 else MERGED
    return None


def _expand(dims: ChannelDims, args: Sequence[Any], _kwargs: dict[str, Any], out: Tensor) -> Channel:
    channel = dims.get(args[0])
    return channel if channel in (None, MERGED) else channel + out.ndim - args[0].ndim


def _drop(dims: ChannelDims, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Channel:
    """Selection and reduction along dimensions."""
    source = args[0]
    channel = dims.get(source)
    if channel in (None, MERGED) or out.ndim == source.ndim:
        return channel
    along = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    gone = {d % source.ndim for d in (along if isinstance(along, tuple | list) else (along or 0,))}
    return None if channel in gone else channel - sum(d < channel for d in gone)


_RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.convolution, aten.native_batch_norm, aten.cudnn_batch_norm, aten.native_group_norm), _first),
    **dict.fromkeys((aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training), _first),
    **dict.fromkeys((aten._batch_norm_with_update, aten.miopen_batch_norm), _first),
    **dict.fromkeys((aten.bmm, aten.baddbmm, aten.matmul, aten.einsum), _unknown),
    **dict.fromkeys((aten._scaled_dot_product_flash_attention_for_cpu, aten._native_multi_head_attention), _unknown),
    **dict.fromkeys((aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_cudnn_attention), _unknown),
    **dict.fromkeys((aten._scaled_dot_product_efficient_attention, aten.stack, aten.im2col, aten.unfold), _unknown),
    aten.mm: _product(0),
    aten.addmm: _product(1),
    aten.linear: _product(0),
    aten.native_layer_norm: _layer_norm,
    aten.permute: _permute,
    **dict.fromkeys((aten.transpose, aten.t, aten.transpose_), _transpose),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten._reshape_alias, aten.reshape, aten.flatten), _reshape),
    **dict.fromkeys((aten.squeeze, aten.unsqueeze, aten.squeeze_, aten.unsqueeze_), _reshape),
    aten.expand: _expand,
    **dict.fromkeys((aten.select, aten.unbind, aten.mean, aten.sum, aten.amax, aten.amin, aten.max, aten.min), _drop),
}


def layout_of(feature: Tensor, channels: ChannelDims, batch: int) -> str:
    """Name the layout of a feature of ``batch`` samples.

    Returns:
        ``NCHW``, ``NHWC``, ``NLC``, ``NC``, or ``other``: tokens behind channels, another number of dimensions, samples
        folded into windows or not in front, or channels that could not be followed.
    """
    if feature.ndim < 2 or len(feature) != batch:
        return "other"
    if feature.ndim == 2:
        return "NC"
    channel = channels.get(feature)
    if channel is None:
        return "other"
    return {(4, 1): "NCHW", (4, 3): "NHWC", (3, 2): "NLC"}.get((feature.ndim, channel), "other")
