"""What a network takes: pictures, or any other tensor of fixed shape."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bundle.files import BundleError
from ..bundle.limits import MAX_DIMENSIONS, MAX_ELEMENTS
from ..checks import is_whole
from ..naming import did_you_mean
from .preprocess import ImageInput, open_image

DTYPES = {"uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class TensorInput:
    """A network's input that needs no reader of its own: token ids, features, or sound.

    Args:
        shape: Shape of one sample, without the batch.
        dtype: ``uint8``, ``int32``, ``int64`` or ``float32``.
        name: Its name, under which partitions take it.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.

    Example:
        >>> TensorInput(shape=(12,), dtype="int64", name="tokens").shape
        (12,)
    """

    kind: ClassVar[str] = "tensor"
    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str = "inputs"

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple | list) or not all(is_whole(n) and n >= 1 for n in self.shape):
            raise ValueError(f"shape must be positive whole numbers, without the batch, got {self.shape!r:.200}")
        if math.prod(self.shape) > MAX_ELEMENTS or len(self.shape) > MAX_DIMENSIONS - 1:
            raise ValueError(
                f"shape may have {MAX_DIMENSIONS - 1} dimensions and {MAX_ELEMENTS} elements, got {self.shape!r:.200}"
            )
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r:.200}")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be the name of the input, got {self.name!r:.200}")

    def mirrored(self, batch: Tensor) -> Tensor:
        """Return a batch like this one of other values, all of them between its least and its largest."""
        return batch.amax() - (batch - batch.amin())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; :meth:`from_dict` reads them back."""
        return {"shape": list(self.shape), "dtype": self.dtype, "name": self.name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorInput:
        """Build the input from :meth:`to_dict`'s values; ValueError where a key is unknown or missing."""
        known = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != known:
            raise ValueError(f"a tensor input takes the keys {sorted(known)}, got {sorted(map(str, values))!s:.200}")
        return cls(**values)


Input = ImageInput | TensorInput
INPUTS: dict[str, type[ImageInput] | type[TensorInput]] = {kind.kind: kind for kind in (ImageInput, TensorInput)}


def read_input(spec: Input, path: str | os.PathLike[str]) -> Tensor:
    """Read an image file as a network takes it: uint8 (C, H, W).

    Raises:
        ImageError: It cannot be used; the message names the path.
        BundleError: The network takes no images.
    """
    if not isinstance(spec, ImageInput):
        raise BundleError(f"this network takes {spec.name}, {spec.dtype} {list(spec.shape)}, not image files")
    return spec(open_image(path))


def input_to_dict(value: Input) -> dict[str, Any]:
    """Return plain JSON values with ``kind`` among them; :func:`input_from_dict` reads them back."""
    return {"kind": value.kind, **value.to_dict()}


def input_from_dict(values: Mapping[str, Any]) -> Input:
    """Build the input of a network from :func:`input_to_dict`'s values.

    Raises:
        ValueError: The kind is unknown, a key is missing or unknown, or a value is out of range.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in INPUTS:
        near = did_you_mean(kind, INPUTS)
        raise ValueError(f"the kind of input must be one of {', '.join(INPUTS)}, got {kind!r:.200}.{near}")
    return INPUTS[kind].from_dict({key: value for key, value in values.items() if key != "kind"})
