"""What a manifest says of a partition and of its inputs and outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import is_whole
from ..naming import did_you_mean, listed
from ..runtime.inputs import DTYPES
from .canonical_json import all_of, typed
from .edges import Signature, repeated
from .files import BundleError, FileEntry, check_name
from .limits import (
    MAX_CLASS_NAME,
    MAX_CLASSES,
    MAX_DIMENSIONS,
    MAX_ELEMENTS,
    MAX_NAME,
    MAX_TENSORS,
    at_most,
    check_label,
)
from .torchscript import FORMAT

OUTPUT_KINDS = ("logits", "map", "boxes", "tokens", "tensor")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A named input or output of a partition.

    Args:
        name: The network's own name of it: ``images``, ``layer2.codes``, ``layer1/logits``, ``logits``.
        dtype: ``uint8``, ``int32``, ``int64`` or ``float32``.
        shape: With -1 for the batch, and for what else may have any size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_label(self.name, "a tensor")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise BundleError(f"the dtype of {self.name} must be one of {', '.join(DTYPES)}, got {self.dtype!r:.200}")
        at_most(self.shape, MAX_DIMENSIONS, f"the dimensions of {self.name}")
        if not all(is_whole(n) and (n >= 1 or n == -1) for n in self.shape):
            raise BundleError(
                f"the shape of {self.name} must be positive whole numbers, -1 for the batch, got {self.shape!s:.200}"
            )
        if math.prod(n for n in self.shape if n > 0) > MAX_ELEMENTS:
            raise BundleError(
                f"{self.name} of shape {self.shape!s:.200} has more than {MAX_ELEMENTS} elements a sample"
            )

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        """Describe a tensor whose first dimension, if it has one, is the batch."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, dtype, tuple(-1 if i == 0 else n for i, n in enumerate(tensor.shape)))

    def check(self, tensor: Tensor, where: str) -> None:
        """Raise :class:`BundleError` unless a tensor has this dtype and shape."""
        fits = tensor.ndim == len(self.shape) and all(
            wanted in (-1, size) for wanted, size in zip(self.shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != DTYPES[self.dtype]:
            raise BundleError(
                f"{where}: {self.name} must be {self.dtype} {list(self.shape)}, "
                f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )

    @classmethod
    def from_dict(cls, values: Any) -> TensorSpec:
        """Read a spec; :class:`BundleError` if a key or type is wrong."""
        found = typed(values, "a tensor", name=str, dtype=str, shape=list)
        return cls(found["name"], found["dtype"], tuple(found["shape"]))


@dataclasses.dataclass(frozen=True)
class OutputSpec:
    """One thing that a network is for.

    Args:
        name: The output's name: ``logits`` where it is one tensor of scores.
        kind: ``logits`` (C,), ``map`` (C, H, W), ``boxes``, ``tokens``, or ``tensor`` for anything else.
        shape: Of one sample, without the batch; a name stands for a size that may differ: ``("boxes", 4)``.
        class_names: Name of each class, in order, where it has classes: of each score of logits, of each channel of a
            map.

    Raises:
        BundleError: An argument does not fit the others.
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "class_names", _checked_classes(self.class_names, self.name))
        if not isinstance(self.kind, str) or self.kind not in OUTPUT_KINDS:
            known = f"{', '.join(OUTPUT_KINDS)}, got {self.kind!r:.200}.{did_you_mean(self.kind, OUTPUT_KINDS)}"
            raise BundleError(f"the kind of the output {self.name} must be one of {known}")
        at_most(self.shape, MAX_DIMENSIONS, f"the dimensions of the output {self.name}")
        if not self.name or not all(map(_is_size, self.shape)):
            raise BundleError(
                f"the output {self.name!r:.200} needs a name and a shape of positive whole numbers, or names for what "
                f"may have any size, got {self.shape!s:.200}"
            )
        check_label(self.name, "an output")
        if self.kind == "logits" and (len(self.shape) != 1 or not self.class_names):
            raise BundleError(
                f"the output {self.name} of logits has one number a class and class_names of at least one name, got "
                f"shape {self.shape} and {len(self.class_names)} names"
            )
        if self.kind in ("logits", "map") and self.class_names and self.shape[:1] != (len(self.class_names),):
            raise BundleError(
                f"the output {self.name} has shape {self.shape}, but there are {len(self.class_names)} class names"
            )

    def fits(self, spec: TensorSpec) -> bool:
        """Whether a partition's output is this one."""
        free = tuple(-1 if isinstance(n, str) else n for n in self.shape)
        return spec.shape == (-1, *free)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "shape": list(self.shape), "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: Any) -> OutputSpec:
        """Read an output; :class:`BundleError` if a key, type or value is wrong."""
        found = typed(values, "an output", name=str, kind=str, shape=list, class_names=list)
        return cls(found["name"], found["kind"], tuple(found["shape"]), tuple(found["class_names"]))


@dataclasses.dataclass(frozen=True)
class PartitionSpec:
    """One partition: a file that runs in one place.

    Args:
        name: Its name, unique in the bundle.
        placement: Where it runs, a free name: ``device``, ``edge``, ``server``.
        file: Its file.
        format: ``torchscript``.
        inputs: In the order in which it takes them.
        outputs: In the order in which it returns them.
        macs: Multiply-accumulates per sample, or ``None`` where nobody counted.
        params: Number of parameters.
    """

    name: str
    placement: str
    file: FileEntry
    format: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: int | None
    params: int

    def __post_init__(self) -> None:
        check_name(self.name, "the partition")
        check_placement(self.name, self.placement)
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            at_most(specs, MAX_TENSORS, f"the {kind} of {self.name}")
        if min(self.macs or 0, self.params) < 0:
            raise BundleError(f"partition {self.name} has negative macs={self.macs} or params={self.params}")
        if self.format != FORMAT:
            raise BundleError(f"partition {self.name} has the unknown format {self.format!r:.200}; known is {FORMAT}")
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if twice := repeated(names):
                raise BundleError(f"partition {self.name} repeats {listed(twice)} among its {kind}")

    @property
    def signature(self) -> Signature:
        """The partition as its route sees it."""
        inputs, outputs = (tuple(spec.name for spec in specs) for specs in (self.inputs, self.outputs))
        return Signature(self.name, self.placement, inputs, outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the file's entry among them at the same level."""
        values = dataclasses.asdict(self)
        file = values.pop("file")
        return {"name": values.pop("name"), "placement": values.pop("placement"), **file, **values}

    @classmethod
    def from_dict(cls, values: Any) -> PartitionSpec:
        """Read a partition; :class:`BundleError` if a key, type or value is wrong."""
        found = typed(
            values,
            "a partition",
            name=str,
            placement=str,
            file=str,
            sha256=str,
            bytes=int,
            format=str,
            inputs=list,
            outputs=list,
            macs=(int, type(None)),
            params=int,
        )
        found["file"] = FileEntry(found["file"], found.pop("sha256"), found.pop("bytes"))
        for key in ("inputs", "outputs"):
            found[key] = tuple(TensorSpec.from_dict(item) for item in found[key])
        return cls(**found)


def _is_size(size: int | str) -> bool:
    return 0 < len(size) <= MAX_NAME if isinstance(size, str) else is_whole(size) and 1 <= size <= MAX_ELEMENTS


def _checked_classes(names: Sequence[str], output: str) -> tuple[str, ...]:
    """Return class names; :class:`BundleError` unless each is text of its own."""
    at_most(names, MAX_CLASSES, f"class_names of the output {output}")
    for name in all_of(list(names), str, "class_names"):
        check_label(name, f"a class of the output {output}", MAX_CLASS_NAME)
    if twice := repeated(names):
        raise BundleError(
            f"class_names of the output {output} names {listed([f'{name!r:.200}' for name in twice])} twice: answers "
            "by name could not be told apart; give each class a name of its own"
        )
    return tuple(names)


def check_placement(partition: str, placement: str) -> None:
    """Raise :class:`BundleError` unless a placement can name a side's files."""
    if not placement:
        raise BundleError(f"partition {partition} needs a placement")
    check_name(placement, f"the placement of {partition},")
