"""What a manifest says of a partition and of its inputs and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .files import BundleError, FileEntry, check_name
from .signatures import Signature
from .torchscript import FORMAT
from .typed_json import typed

_DTYPES = {"uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A named input or output of a partition.

    Args:
        name: ``images``, ``levels``, ``codes``, ``low``, ``high``, ``z``, ``before``, ``exit_logits`` or ``logits``, by
            the route's convention.
        dtype: ``uint8``, ``int32``, ``int64`` or ``float32``.
        shape: With -1 for the batch.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise BundleError(f"the dtype of {self.name} must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < -1 for n in self.shape):
            raise BundleError(f"the shape of {self.name} must be whole numbers, -1 for the batch, got {self.shape}")

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
        if not fits or tensor.dtype != _DTYPES[self.dtype]:
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
        if not self.placement:
            raise BundleError(f"partition {self.name} needs a placement")
        if min(self.macs or 0, self.params) < 0:
            raise BundleError(f"partition {self.name} has negative macs={self.macs} or params={self.params}")
        if self.format != FORMAT:
            raise BundleError(f"partition {self.name} has the unknown format {self.format!r}; known is {FORMAT}")
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if twice := repeated(names):
                raise BundleError(f"partition {self.name} repeats {', '.join(twice)} among its {kind}")

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


def repeated(values: Sequence[str]) -> list[str]:
    """Return what occurs more than once."""
    return sorted({value for value in values if values.count(value) > 1})
