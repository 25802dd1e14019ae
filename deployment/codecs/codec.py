"""How a partition's outputs become the bytes of one payload per sample, and how they are read back."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checks import is_whole
from ..naming import did_you_mean, listed
from .packing import FLOAT_BITS, CodecError, check_bits

# A representation beyond this is a damaged description, not a network's.
_MAX_ELEMENTS = 2**28
_MAX_DIMENSIONS = 15
_Bytes = npt.NDArray[np.uint8]


class Codec(abc.ABC):
    """One tensor's way over an edge: turns what a partition emits of it into bytes, and bytes into another's inputs.

    Attributes:
        kind: The name under which a manifest finds the class in :data:`CODECS`.
        sends: What the sending partition emits, in order. On the route the tensor's name stands before it:
            ``layer2.codes``; see :meth:`sent`.
        delivers: What the receiving partition takes, in order.
    """

    kind: ClassVar[str]
    sends: ClassVar[tuple[str, ...]]
    delivers: ClassVar[tuple[str, ...]]
    shape: tuple[int, ...]
    bits: int

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Tensor]:
        """Extra inputs of the sending partition by name, such as the number of levels; they may change at run time."""

    @property
    def levels(self) -> int:
        """Number of levels of the integer codes that a sending partition is told to make; 0 where it is told none."""
        return 0

    @property
    def lossless(self) -> bool:
        """Whether what arrives is exactly what was sent."""
        return True

    @property
    def whole(self) -> bool:
        """Whether it sends the tensor itself, which inside a placement is handed over as it is."""
        return False

    def sent(self, tensor: str) -> dict[str, str]:
        """Return what the sending partition emits of a tensor: names on the route by the names in ``sends``.

        Example:
            >>> from cleave.deployment import UniformCodec
            >>> UniformCodec(shape=(3,), bits=4).sent("layer2")
            {'codes': 'layer2.codes', 'low': 'layer2.low', 'high': 'layer2.high'}
        """
        return {name: self._on_route(tensor, name) for name in self.sends}

    def delivered(self, tensor: str) -> dict[str, str]:
        """Return what the receiving partition takes of a tensor: names on the route by the names in ``delivers``."""
        return {name: self._on_route(tensor, name) for name in self.delivers}

    def settings_of(self, tensor: str) -> dict[str, Tensor]:
        """Return the settings by their names on the route."""
        return {self._on_route(tensor, name): value for name, value in self.settings.items()}

    def _on_route(self, tensor: str, name: str) -> str:
        return tensor if self.whole else f"{tensor}.{name}"

    @abc.abstractmethod
    def encode(self, tensors: Mapping[str, Tensor]) -> list[bytes]:
        """Turn the tensors named in ``sends`` of B samples into B payloads; :class:`CodecError` if they do not fit."""

    @abc.abstractmethod
    def decode(self, payloads: Sequence[bytes]) -> dict[str, Tensor]:
        """Turn B payloads into the tensors named in ``delivers``; :class:`CodecError` if one is damaged."""

    def prepare(self) -> None:
        """Get ready to code: what is missed is named, and what can be made before the first sample is made."""
        return

    @abc.abstractmethod
    def with_bits(self, bits: int) -> Codec:
        """Return this codec at another width; :class:`CodecError` where it cannot have that width."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with ``kind`` among them; :func:`codec_from_dict` reads them back."""


@dataclasses.dataclass(frozen=True)
class FloatCodec(Codec):
    """The representation as it is: raw little-endian float32, 4 bytes an element (``bits: 32``).

    Args:
        shape: Shape of one sample's representation, without the batch.
    """

    kind: ClassVar[str] = "float32"
    sends: ClassVar[tuple[str, ...]] = ("z",)
    delivers: ClassVar[tuple[str, ...]] = ("z",)

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Always 32."""
        return FLOAT_BITS

    @property
    def whole(self) -> bool:
        """Always: the representation is sent as it is."""
        return True

    @property
    def settings(self) -> dict[str, Tensor]:
        """Nothing: a float representation has no run-time setting."""
        return {}

    @property
    def payload_bytes(self) -> int:
        """Length of every payload in bytes."""
        return 4 * math.prod(self.shape)

    def encode(self, tensors: Mapping[str, Tensor]) -> list[bytes]:
        """Turn z float32 (B, *shape) into one payload per sample; values are sent as they are.

        Raises:
            CodecError: ``z`` is missing or of the wrong shape or dtype.
        """
        (z,) = named(tensors, self.sends)
        check_batch_shape("z", z, self.shape)
        if z.dtype != torch.float32:
            raise CodecError(f"z must be float32, got {z.dtype}")
        return [row.tobytes() for row in z.detach().flatten(1).cpu().numpy().astype("<f4")]

    def decode(self, payloads: Sequence[bytes]) -> dict[str, Tensor]:
        """Turn B payloads into z float32 (B, *shape).

        Raises:
            CodecError: A payload has the wrong length.
        """
        values = payload_rows(bytes_of(payloads), self.payload_bytes).view("<f4").astype(np.float32)
        return {"z": torch.from_numpy(values).view(len(payloads), *self.shape)}

    def with_bits(self, bits: int) -> FloatCodec:
        """Return this codec if ``bits`` is 32; a float representation has no codes to narrow."""
        if check_bits(bits) != FLOAT_BITS:
            raise CodecError(f"this edge sends float32 without a quantiser: bits must stay {FLOAT_BITS}, got {bits}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"kind": self.kind, "shape": list(self.shape)}


CODECS: dict[str, type[Codec]] = {FloatCodec.kind: FloatCodec}
# Kinds whose module is imported, and enters them above, once one is named: a device loads no image codec in vain.
_ON_DEMAND = {"tiled_image": ".tiled_image"}


def known_kinds() -> tuple[str, ...]:
    """Return the kinds of codecs that a manifest can name."""
    return tuple(sorted({*CODECS, *_ON_DEMAND}))


def codec_from_dict(values: Mapping[str, Any]) -> Codec:
    """Build a codec from :meth:`Codec.to_dict`'s values.

    Raises:
        CodecError: The kind is unknown, a key is missing or unknown, or a value is out of range.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
        raise CodecError(f"a codec needs a kind, one of {', '.join(known_kinds())}, got {values!r:.200}")
    arguments = {key: value for key, value in values.items() if key != "kind"}
    kind = values["kind"]
    if kind in _ON_DEMAND:
        importlib.import_module(_ON_DEMAND[kind], __package__)
    if kind not in CODECS:
        known = known_kinds()
        raise CodecError(f"unknown codec kind {kind!r:.200}; known are {', '.join(known)}.{did_you_mean(kind, known)}")
    codec = CODECS[kind]
    keys = {field.name for field in dataclasses.fields(codec)}  # type: ignore[arg-type]
    if arguments.keys() != keys:
        found = listed([repr(key) for key in sorted(map(str, arguments))])
        raise CodecError(f"a {codec.kind} codec takes the keys {sorted(keys)}, got [{found}]")
    return codec(**arguments)


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one sample as a tuple; :class:`CodecError` unless it is positive and not absurdly large."""
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if not sizes or not all(is_whole(n) and n >= 1 for n in sizes):
        raise CodecError(f"shape must be positive integers, without the batch, got {shape!r:.200}")
    if len(sizes) > _MAX_DIMENSIONS:
        raise CodecError(f"shape may have at most {_MAX_DIMENSIONS} dimensions, got {len(sizes)}")
    if math.prod(sizes) > _MAX_ELEMENTS:
        raise CodecError(f"shape {sizes!s:.200} has more than {_MAX_ELEMENTS} elements")
    return tuple(int(n) for n in sizes)


def named(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """Return the tensors of these names; :class:`CodecError` if one is missing."""
    if missing := [name for name in names if name not in tensors]:
        raise CodecError(f"the codec sends {', '.join(names)}; missing {', '.join(missing)}")
    if wrong := [name for name in names if not isinstance(tensors[name], Tensor)]:
        raise CodecError(f"{wrong[0]} must be a tensor, got {type(tensors[wrong[0]]).__name__}")
    return [tensors[name] for name in names]


def check_batch_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise :class:`CodecError` unless a tensor is a batch of this shape."""
    if tensor.ndim != len(shape) + 1 or tuple(tensor.shape[1:]) != shape:
        raise CodecError(f"{name} must have shape (B, {', '.join(map(str, shape))}), got {tuple(tensor.shape)}")


def bytes_of(payloads: Sequence[bytes | bytearray | memoryview]) -> list[bytes]:
    """Return payloads as bytes, whatever holds them; :class:`CodecError` where one is nothing that holds bytes."""
    if not isinstance(payloads, list | tuple):
        raise CodecError(f"payloads must be a list with one payload a sample, got {type(payloads).__name__}")
    if set(map(type, payloads)) <= {bytes}:
        return list(payloads)
    for index, payload in enumerate(payloads):
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise CodecError(f"payload {index} must be bytes, got {type(payload).__name__}")
    return [payload if isinstance(payload, bytes) else bytes(payload) for payload in payloads]


def payload_rows(payloads: Sequence[bytes], length: int) -> _Bytes:
    """Return payloads of one length as rows of bytes; :class:`CodecError` if one has another length."""
    check_length(payloads, length)
    return np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), length)


def check_length(payloads: Sequence[bytes], length: int) -> None:
    """Raise :class:`CodecError` if a payload has another length."""
    if set(map(len, payloads)) <= {length}:
        return
    for index, payload in enumerate(payloads):
        if len(payload) != length:
            raise CodecError(
                f"payload {index} has {len(payload)} bytes instead of {length}: cut short or not this edge's"
            )
