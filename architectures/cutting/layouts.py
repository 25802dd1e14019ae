"""What the dimensions of a feature hold, found by following them through the operations that ran."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten


@dataclass(frozen=True)
class Run:
    """``count`` steps of ``step`` along an axis: N (samples), C, H, W, T (tokens), or a number of its own."""

    axis: str | int
    step: int
    count: int


# A dimension runs through its parts from the outer to the inner one: rows merged with columns are (H, W), windows of 7
# in 56 rows are the run (H, 7, 8). A dimension of length 1 has no parts.
Dim = tuple[Run, ...]
Dims = tuple[Dim, ...]
_unknown_axes = itertools.count()


def _dim(axis: str | int | None, length: int) -> Dim:
    """A dimension that runs through a new axis; ``None`` stands for an unknown one."""
    return (Run(next(_unknown_axes) if axis is None else axis, 1, length),) if length != 1 else ()


def _join(parts: Sequence[Run]) -> Dim:
    """Merge neighbouring parts that run on along their axis."""
    joined: list[Run] = []
    for part in parts:
        if joined and joined[-1].axis == part.axis and joined[-1].step == part.step * part.count:
            part = Run(part.axis, part.step, joined.pop().count * part.count)
        joined.append(part)
    return tuple(joined)


def _regroup(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """Follow a reshape; ``None`` where a length does not divide what it is taken from."""
    parts = [part for dim in reversed(dims) for part in reversed(dim)]  # the innermost first
    result: list[Dim] = []
    for length in reversed(shape):
        taken: list[Run] = []
        rest = length
        while rest > 1:
            if not parts:
                return None
            part = parts.pop(0)
            if part.count > rest:
                if part.count % rest:
                    return None
                parts.insert(0, Run(part.axis, part.step * rest, part.count // rest))
                part = Run(part.axis, part.step, rest)
            elif rest % part.count:
                return None
            taken.insert(0, part)
            rest //= part.count
        result.insert(0, _join(taken))
    return tuple(result)


def _resize(dim: Dim, length: int) -> Dim:
    """A dimension after padding, pooling, slicing or concatenation along it."""
    if math.prod(part.count for part in dim) == length:
        return dim
    axes = {part.axis for part in dim}
    if "C" in axes:
        return _dim("C", length)
    if len(axes) > 1:
        return _dim("T" if axes <= {"H", "W", "T"} else None, length)
    return _dim(next(iter(axes), None), length)


class DimTracker(TorchDispatchMode):
    """Follows what the dimensions of every tensor hold while it is active.

    A convolution says what the four dimensions are, a matrix product with weights makes channels of the dimension it
    sums over (or of positions, positions); permutations and reshapes move and regroup dimensions, and everything else
    keeps those of its operands. Shapes alone could not tell a map of 8 × 8 positions and 8 channels from its transpose,
    or windows from rows; and many networks take one image size only, so that their response to another says nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dims: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def start(self, batch: Tensor) -> None:
        """Say what a network's input holds: images (B, C, H, W), vectors (B, C) or token ids (B, L); else unknown."""
        axes: Sequence[str | None] = "NCHW" if batch.ndim == 4 else "NC" if batch.ndim == 2 else "N"
        if not batch.is_floating_point() and batch.ndim == 2:
            axes = "NT"
        axes = [*axes, *[None] * (batch.ndim - len(axes))]
        self._dims[batch] = tuple(_dim(axis, n) for axis, n in zip(axes, batch.shape, strict=True))

    def get(self, tensor: Any) -> Dims | None:
        """Return what is known of a tensor's dimensions."""
        return self._dims.get(tensor) if isinstance(tensor, Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what the dimensions of its results are."""
        kwargs = kwargs or {}
        rule = _RULES.get(func.overloadpacket, _same_place)
        known = [self.get(arg) for arg in args]  # before an in-place operation
        result = func(*args, **kwargs)
        for out in result if isinstance(result, tuple | list) else (result,):
            if isinstance(out, Tensor):
                dims = rule(self, known, args, kwargs, out)
                if dims is None or len(dims) != out.ndim:
                    self._dims.pop(out, None)
                else:
                    self._dims[out] = dims
        return result


# A rule takes the tracker, the dimensions of each positional operand, the operands and one result.
Rule = Callable[[DimTracker, list[Dims | None], Sequence[Any], dict[str, Any], Tensor], Dims | None]


def _same_place(
    tracker: DimTracker, _known: list[Dims | None], args: Sequence[Any], kwargs: dict[str, Any], out: Tensor
) -> Dims | None:
    """Elementwise operations, pooling, slices, concatenation: the operand of which most is known decides."""
    operands = [a for arg in (*args, *kwargs.values()) for a in (arg if isinstance(arg, tuple | list) else (arg,))]
    known = [(dims, a.shape) for a in operands if (dims := tracker.get(a)) is not None and a.ndim == out.ndim]
    if not known:
        return None

    def unknown(pair: tuple[Dims, torch.Size]) -> tuple[bool, int]:
        dims, shape = pair
        return shape.numel() < out.numel(), sum(isinstance(part.axis, int) or len(d) > 1 for d in dims for part in d)

    return tuple(_resize(dim, length) for dim, length in zip(min(known, key=unknown)[0], out.shape, strict=True))


def _convolution(_t: DimTracker, known: list[Dims | None], _a: Sequence[Any], _k: dict[str, Any], out: Tensor) -> Dims:
    """Convolution: samples, channels and positions; samples that were folded stay so."""
    samples = _resize(known[0][0], len(out)) if known[0] else _dim("N", len(out))
    positions = "HW" if out.ndim == 4 else "T" * (out.ndim - 2)
    return (samples, *(_dim(axis, n) for axis, n in zip("C" + positions, out.shape[1:], strict=True)))


def _forget(*_: Any) -> None:
    return


def _product(which: int) -> Rule:
    def rule(_t: DimTracker, known: list[Dims | None], _a: Sequence[Any], _k: dict[str, Any], out: Tensor) -> Dims:
        """Rows times weights: over channels (or what is unknown) it makes channels, over positions positions."""
        dims = known[which] or (_dim(None, out.shape[0]), ())
        axes = {part.axis for part in dims[1]}
        positions = axes and axes <= {"H", "W", "T"}
        return dims[0], _resize(dims[1], out.shape[1]) if positions else _dim("C", out.shape[1])

    return rule


def _batched_product(which: int) -> Rule:
    def rule(
        _t: DimTracker, known: list[Dims | None], _a: Sequence[Any], _k: dict[str, Any], out: Tensor
    ) -> Dims | None:
        """Rows of the first operand, columns of the second."""
        left, right = known[which : which + 2]
        batch = left or right
        if batch is None:
            return None
        rows = left[1] if left else _dim(None, out.shape[1])
        return batch[0], rows, right[2] if right else _dim(None, out.shape[2])

    return rule


def _attention(
    _t: DimTracker, known: list[Dims | None], _a: Sequence[Any], _k: dict[str, Any], out: Tensor
) -> Dims | None:
    """Queries decide the rows, values the columns."""
    query, _, value = known[:3]
    return (*query[:-1], value[-1]) if query and value and out.ndim == len(query) else None


def _layer_norm(
    _t: DimTracker, known: list[Dims | None], args: Sequence[Any], _k: dict[str, Any], out: Tensor
) -> Dims | None:
    if out.shape != args[0].shape:
        return None  # the statistics
    if known[0] or len(args[1]) != 1:
        return known[0]
    return (*(_dim(None, n) for n in out.shape[:-1]), _dim("C", out.shape[-1]))


def _embedding(
    tracker: DimTracker, _known: list[Dims | None], args: Sequence[Any], _k: dict[str, Any], out: Tensor
) -> Dims | None:
    """Rows of a table for ids: a dimension of channels behind those of the ids."""
    ids = tracker.get(args[1])
    return (*ids, _dim("C", out.shape[-1])) if ids is not None else None


def _permute(
    _t: DimTracker, known: list[Dims | None], args: Sequence[Any], _k: dict[str, Any], _o: Tensor
) -> Dims | None:
    return tuple(known[0][dim] for dim in args[1]) if known[0] else None


def _transpose(
    _t: DimTracker, known: list[Dims | None], args: Sequence[Any], _k: dict[str, Any], _o: Tensor
) -> Dims | None:
    if not known[0]:
        return None
    dims = list(known[0])
    first, second = args[1:] if len(args) == 3 else (0, -1)
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def _reshape(
    _t: DimTracker, known: list[Dims | None], _a: Sequence[Any], _k: dict[str, Any], out: Tensor
) -> Dims | None:
    return _regroup(known[0], out.shape) if known[0] else None


def _expand(
    _t: DimTracker, known: list[Dims | None], args: Sequence[Any], _k: dict[str, Any], out: Tensor
) -> Dims | None:
    if not known[0]:
        return None
    added = [_dim(None, n) for n in out.shape[: out.ndim - len(known[0])]]
    return (*added, *(_resize(d, n) for d, n in zip(known[0], out.shape[len(added) :], strict=True)))


def _drop(
    _t: DimTracker, known: list[Dims | None], args: Sequence[Any], kwargs: dict[str, Any], out: Tensor
) -> Dims | None:
    """Selection and reduction along dimensions."""
    dims = known[0]
    if not dims:
        return None
    if out.ndim == len(dims):
        return tuple(_resize(dim, length) for dim, length in zip(dims, out.shape, strict=True))
    along = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    gone = {dim % len(dims) for dim in (along if isinstance(along, tuple | list) else (along or 0,))}
    return tuple(dim for i, dim in enumerate(dims) if i not in gone)


_RULES: dict[Any, Rule] = {
    aten.convolution: _convolution,
    aten.mm: _product(0),
    aten.addmm: _product(1),
    aten.bmm: _batched_product(0),
    aten.baddbmm: _batched_product(1),
    **dict.fromkeys(
        (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention), _attention
    ),
    **dict.fromkeys(
        (aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention), _attention
    ),
    **dict.fromkeys((aten._native_multi_head_attention, aten.stack, aten.im2col, aten.unfold), _forget),
    aten.embedding: _embedding,
    aten.native_layer_norm: _layer_norm,
    aten.permute: _permute,
    **dict.fromkeys((aten.transpose, aten.t), _transpose),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten._reshape_alias, aten.squeeze, aten.unsqueeze), _reshape),
    aten.expand: _expand,
    **dict.fromkeys((aten.select, aten.unbind, aten.mean, aten.sum, aten.amax, aten.amin, aten.max, aten.min), _drop),
}


def layout_of(feature: Tensor, tracker: DimTracker, batch: int) -> str:
    """Name the layout of a feature of ``batch`` samples.

    Returns:
        ``NCHW``, ``NHWC``, ``NLC``, ``NC``, or ``other``: tokens behind channels, another number of dimensions, samples
        folded into windows or not in front, positions in windows or with columns before rows, or dimensions that could
        not be followed.
    """
    if feature.ndim < 2 or len(feature) != batch:
        return "other"
    if feature.ndim == 2:
        return "NC"
    dims = tracker.get(feature)
    if dims is None or not _runs_along(dims[0], "N"):
        return "other"
    if feature.ndim == 3:
        return "NLC" if _has_channels(dims[2]) and not any(part.axis == "C" for part in dims[1]) else "other"
    if feature.ndim == 4 and _has_channels(dims[1]) and _is_grid(dims[2], dims[3]):
        return "NCHW"
    return "NHWC" if feature.ndim == 4 and _has_channels(dims[3]) and _is_grid(dims[1], dims[2]) else "other"


def _runs_along(dim: Dim, axis: str) -> bool:
    return not dim or (len(dim) == 1 and dim[0].axis == axis)


def _has_channels(dim: Dim) -> bool:
    """Channels, also with neighbouring positions stacked onto them, as patch merging does."""
    return not dim or any(part.axis == "C" for part in dim)


def _is_grid(rows: Dim, columns: Dim) -> bool:
    """Rows and columns; also tokens that are split in two again (a class token came and went)."""
    tokens = _join((*rows, *columns))
    return (_runs_along(rows, "H") and _runs_along(columns, "W")) or (len(tokens) == 1 and tokens[0].axis == "T")
