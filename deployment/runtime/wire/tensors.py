"""Tensors as requests and answers hold them: raw bytes or typed lists, checked before memory is taken for them."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...bundle.specs import TensorSpec
from .status import invalid

BYTES = "BYTES"
# Of a request and of a batch: a server is warmed up at each size.
MOST_SAMPLES = 256
_LENGTH = struct.Struct("<I")
# By datatype: how a number is stored, and which typed list holds it, with the most bytes that protobuf takes for one.
_NUMBERS = {
    "UINT8": ("<u1", "uint_contents", 2),
    "INT32": ("<i4", "int_contents", 10),
    "INT64": ("<i8", "int64_contents", 10),
    "FP32": ("<f4", "fp32_contents", 4),
}
_OF_DTYPE = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float32": "FP32"}
_TYPED = ("bool_contents", "uint64_contents", "fp64_contents", "bytes_contents", *(x[1] for x in _NUMBERS.values()))


@dataclasses.dataclass(frozen=True)
class Field:
    """A named input or output of a served model.

    Args:
        name: Its name.
        datatype: ``UINT8``, ``INT32``, ``INT64``, ``FP32`` or ``BYTES``.
        shape: With -1 for the batch, and for what else may have any size.
        longest: Most bytes that an element of ``BYTES`` may have.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    longest: int = 0

    @classmethod
    def of(cls, spec: TensorSpec, name: str | None = None) -> Field:
        """Describe a tensor of a partition, perhaps by another name."""
        return cls(spec.name if name is None else name, _OF_DTYPE[spec.dtype], spec.shape)

    def most_bytes(self, samples: int) -> int:
        """Most bytes that a request of some samples takes for it, typed or raw; sizes that may differ count once."""
        rest = math.prod(n for n in self.shape if n > 0)
        each = self.longest + 8 if self.datatype == BYTES else max(_NUMBERS[self.datatype][2], 8)
        return samples * rest * each + 512

    def check(self, tensor: Any, most: int) -> int:
        """Check what a request says of it, before its content is looked at; return the number of elements.

        Raises:
            ServingError: The datatype or the shape is another, or there are more samples than ``most``.
        """
        if tensor.datatype != self.datatype:
            raise invalid(f"{self.name} must have the datatype {self.datatype}, got {tensor.datatype!r:.40}")
        shape = tensor.shape
        fits = len(shape) == len(self.shape) and all(
            n >= 1 and want in (-1, n) for want, n in zip(self.shape, shape, strict=True)
        )
        if not fits:
            raise invalid(f"{self.name} must have the shape {list(self.shape)}, got {list(shape[:16])}")
        if shape and self.shape[0] == -1 and shape[0] > most:
            raise invalid(f"{self.name} has {shape[0]} samples; a request may have {most}: send several requests")
        return math.prod(shape)

    def tensor(self, raw: bytes | memoryview | None, contents: Any, shape: Sequence[int], count: int) -> Tensor:
        """Return numbers of a checked shape from raw bytes or a typed list; ServingError where there are others."""
        stored, listed, _ = _NUMBERS[self.datatype]
        if raw is not None:
            wanted = count * int(stored[2:])
            if len(raw) != wanted:
                raise invalid(f"{self.name} of shape {list(shape)} has {wanted} bytes, got {len(raw)}")
            values = np.frombuffer(raw, stored)
        else:
            found = _listed(self.name, contents, listed, count)
            if self.datatype == "UINT8" and count and max(found) > 255:
                raise invalid(f"{self.name} is UINT8, but holds {max(found)}")
            values = np.fromiter(found, stored, count)
        # A copy: what a message holds cannot be written to, and torch wants what can.
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("="))).view(*shape)

    def texts(self, raw: bytes | memoryview | None, contents: Any, count: int) -> list[bytes]:
        """Return byte strings; ServingError where there are not as many, or one is too long."""
        if raw is None:
            found = list(_listed(self.name, contents, "bytes_contents", count))
        else:
            found = _split(self.name, raw, count)
        for index, text in enumerate(found):
            if len(text) > self.longest:
                raise invalid(f"{self.name} {index} has {len(text)} bytes; this bundle's have at most {self.longest}")
        return found


def _listed(name: str, contents: Any, wanted: str, count: int) -> Any:
    """Return the typed list that holds a tensor."""
    found = getattr(contents, wanted)
    if other := [each for each in _TYPED if each != wanted and len(getattr(contents, each))]:
        raise invalid(f"{name} must be in {wanted}, but {other[0]} holds {len(getattr(contents, other[0]))} values")
    if len(found) != count:
        raise invalid(f"{name} needs {count} values in {wanted}, got {len(found)}")
    return found


def _split(name: str, raw: bytes | memoryview, count: int) -> list[bytes]:
    """Return byte strings, each of which has its length in front."""
    found, at = [], 0
    for index in range(count):
        if at + _LENGTH.size > len(raw):
            raise invalid(f"{name} needs {count} byte strings, each behind its length, but ends in front of {index}")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if length > len(raw) - at:
            raise invalid(f"{name} {index} claims {length} bytes, but {len(raw) - at} follow")
        found.append(bytes(raw[at : at + length]))
        at += length
    if at != len(raw):
        raise invalid(f"{name} has {len(raw) - at} bytes more than its {count} byte strings")
    return found


def joined(texts: Sequence[bytes]) -> list[bytes]:
    """Return byte strings as parts of raw content: each behind its length."""
    return [part for text in texts for part in (_LENGTH.pack(len(text)), text)]


def split(raw: bytes, count: int) -> list[bytes]:
    """Read byte strings, each behind its length; ServingError where it is anything else."""
    return _split("the answer", raw, count)


def raw_of(tensor: Tensor) -> tuple[str, bytes]:
    """Return a tensor's datatype, and its values as raw content."""
    datatype = _OF_DTYPE[str(tensor.dtype).removeprefix("torch.")]
    return datatype, tensor.detach().cpu().contiguous().numpy().astype(_NUMBERS[datatype][0], copy=False).tobytes()


def add_output(response: Any, name: str, content: Tensor | Sequence[bytes]) -> None:
    """Add a tensor, or a byte string for each sample, to an answer."""
    response.raw_output_contents.append(b"".join(_declared(response.outputs, name, content)))


def add_input(request: Any, name: str, content: Tensor | Sequence[bytes]) -> None:
    """Add a tensor, or a byte string for each sample, to a request."""
    request.raw_input_contents.append(b"".join(declare_input(request, name, content)))


def declare_input(request: Any, name: str, content: Tensor | Sequence[bytes]) -> list[bytes]:
    """Say in a request that it has an input, and return its raw content, in parts, for :func:`~.protocol.written`."""
    return _declared(request.inputs, name, content)


def _declared(into: Any, name: str, content: Tensor | Sequence[bytes]) -> list[bytes]:
    if isinstance(content, Tensor):
        datatype, raw = raw_of(content)
        into.add(name=name, datatype=datatype, shape=list(content.shape))
        return [raw]
    into.add(name=name, datatype=BYTES, shape=[len(content)])
    return joined(content)
