"""Integer codes of the uniform quantiser, each sample's range with them, and their densest form."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .codec import CODECS, Codec, bytes_of, check_batch_shape, check_length, checked_shape, named, payload_rows
from .packing import CodecError, check_code_bits, checked_codes, pack_rows, packed_bytes, unpack_rows

RANGE_LIMIT = 2.0**126
"""How far from 0 a range may reach, so that float32 holds its width and every value decoded from it."""

_RANGE_BYTES = 8
_FEW = 256


@dataclasses.dataclass(frozen=True)
class CodesCodec(Codec):
    """Integer codes of the uniform affine quantiser, with the range where each sample has its own.

    A payload is ``[low, high as little-endian float32, unless the range is fixed] + body``; a subclass says what the
    body is.

    Args:
        shape: Shape of one sample's codes, without the batch.
        bits: Width of a code, 2 to 16.
        low: Lower end of the range all samples share; with ``high``. ``None`` sends each sample's own range.
        high: Upper end of that range.

    Raises:
        ValueError: An argument is out of range; the message names it and its value.
    """

    sends: ClassVar[tuple[str, ...]] = ("codes", "low", "high")
    delivers: ClassVar[tuple[str, ...]] = ("codes", "low", "high", "levels")

    shape: tuple[int, ...]
    bits: int
    low: float | None = None
    high: float | None = None

    @abc.abstractmethod
    def pack(self, codes: npt.NDArray[np.uint16], ranges: npt.NDArray[np.float32]) -> list[bytes]:
        """Turn the codes (B, N) of B samples with their ranges (B, 2) into B bodies."""

    @abc.abstractmethod
    def unpack(self, bodies: Sequence[bytes], ranges: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Turn B bodies with their ranges (B, 2) into codes (B, N); :class:`CodecError` if one is damaged."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))
        object.__setattr__(self, "bits", check_code_bits(self.bits))
        if (self.low is None) != (self.high is None):
            raise CodecError(f"low and high go together, got low={self.low!r:.100} and high={self.high!r:.100}")
        for name in ("low", "high"):
            # Kept as the float32 that the network computes with, so that both sides of an edge agree to the bit.
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _checked_float(value, name))
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise CodecError(f"low must be below high, got low={self.low} and high={self.high}")
            if not usable_range(self.low, self.high):
                raise CodecError(
                    f"low and high must lie within ±{RANGE_LIMIT:.4g}, or what is decoded overflows float32, got "
                    f"low={self.low} and high={self.high}"
                )

    @property
    def levels(self) -> int:
        """Number of levels, 2**bits."""
        return 2**self.bits

    @property
    def settings(self) -> dict[str, Tensor]:
        """The number of levels, as an int64 scalar."""
        return {"levels": self._levels}

    @functools.cached_property
    def _levels(self) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.int64, device="cpu")

    def encode(self, tensors: Mapping[str, Tensor]) -> list[bytes]:
        """Turn codes int (B, *shape) with low and high float32 (B,) into one payload per sample.

        Raises:
            CodecError: A tensor is missing or of the wrong shape or dtype, a code is outside 0..2**bits-1, a range is
                not finite, too wide or upside down, or differs from the codec's fixed one.
        """
        codes, low, high = named(tensors, self.sends)
        check_batch_shape("codes", codes, self.shape)
        values = checked_codes(codes, self.bits).reshape(len(codes), self._count)
        ranges = self._checked_ranges(low, high, len(codes))
        bodies = self.pack(values, ranges)
        if self.low is not None:
            return bodies
        return [row.astype("<f4").tobytes() + body for row, body in zip(ranges, bodies, strict=True)]

    def decode(self, payloads: Sequence[bytes]) -> dict[str, Tensor]:
        """Turn B payloads into codes int32 (B, *shape), low and high float32 (B,), and levels, an int64 scalar.

        Raises:
            CodecError: A payload is damaged, or has a range that is not finite, too wide or upside down.
        """
        payloads = bytes_of(payloads)
        self.check_lengths(payloads)
        batch = len(payloads)
        if self.low is not None:
            ranges, bodies = self._fixed_ranges(batch), payloads
        else:
            heads = b"".join(payload[:_RANGE_BYTES] for payload in payloads)
            ranges = np.frombuffer(heads, "<f4").astype(np.float32).reshape(batch, 2)
            bodies = [payload[_RANGE_BYTES:] for payload in payloads]
            _check_ranges(ranges)
        codes = torch.from_numpy(self.unpack(bodies, ranges))
        return {
            "codes": codes.view(batch, *self.shape),
            "low": torch.from_numpy(ranges[:, 0].copy()),
            "high": torch.from_numpy(ranges[:, 1].copy()),
            **self.settings,
        }

    def check_lengths(self, payloads: Sequence[bytes]) -> None:
        """Raise :class:`CodecError` where a payload cannot have its length."""
        for index, payload in enumerate(payloads):
            if self.low is None and len(payload) < _RANGE_BYTES:
                raise CodecError(f"payload {index} has {len(payload)} bytes, its range alone {_RANGE_BYTES}: cut short")

    def with_bits(self, bits: int) -> Self:
        """Return this codec at another width, 2 to 16; all else stays."""
        return dataclasses.replace(self, bits=bits)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``low`` and ``high`` are null where each sample sends its own range."""
        return {"kind": self.kind, **dataclasses.asdict(self), "shape": list(self.shape)}

    @functools.cached_property
    def _count(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def _ends(self) -> tuple[bytes, bytes]:
        """Both ends of the fixed range as a float32 in memory."""
        return np.float32(self.low).tobytes(), np.float32(self.high).tobytes()

    def _fixed_ranges(self, batch: int) -> npt.NDArray[np.float32]:
        """Return the fixed range for each of so many samples; for few of them it is kept, and cannot be written to."""
        found = self._kept_ranges.get(batch)
        if found is None:
            found = np.full((batch, 2), (self.low, self.high), np.float32)
            found.flags.writeable = False
            if batch <= _FEW:
                self._kept_ranges[batch] = found
        return found

    @functools.cached_property
    def _kept_ranges(self) -> dict[int, npt.NDArray[np.float32]]:
        return {}

    def _checked_ranges(self, low: Tensor, high: Tensor, batch: int) -> npt.NDArray[np.float32]:
        for name, tensor in (("low", low), ("high", high)):
            if tensor.shape != (batch,) or tensor.dtype != torch.float32:
                raise CodecError(f"{name} must be float32 ({batch},), got {_describe(tensor)}")
        lows, highs = low.numpy(force=True), high.numpy(force=True)
        # The usual case, told by a comparison of bytes: the device's range is the codec's own.
        if self.low is not None and (lows.tobytes(), highs.tobytes()) == tuple(end * batch for end in self._ends):
            return self._fixed_ranges(batch)
        ranges = np.stack([lows, highs], 1)
        if self.low is None or self.high is None:
            _check_ranges(ranges)
            return ranges
        # The constants are not sent: a few ulps are another device's noise, more is another network's range.
        tolerance = 1e-5 * (self.high - self.low) + 1e-6 * max(abs(self.low), abs(self.high))
        fixed = np.array([self.low, self.high])
        near = ((difference := np.abs(ranges - fixed)) <= tolerance).all()
        # Whatever is near to a range is one too, and finite, unless that range is narrow.
        if not near or 2 * tolerance >= self.high - self.low:
            _check_ranges(ranges)
        if not near:
            row = int(difference.max(1).argmax())
            raise CodecError(
                f"the range of sample {row} is {ranges[row].tolist()}, but the codec's fixed range is "
                f"{fixed.tolist()}; it is not sent, so the two must agree"
            )
        return ranges


@dataclasses.dataclass(frozen=True)
class UniformCodec(CodesCodec):
    """Codes packed densely, ``bits`` bits each, so that every payload of a codec has the same length.

    Args:
        shape: Shape of one sample's codes, without the batch.
        bits: Width of a code, 2 to 16.
        low: Lower end of the range all samples share; with ``high``. ``None`` sends each sample's own range.
        high: Upper end of that range.

    Raises:
        ValueError: An argument is out of range; the message names it and its value.

    Example:
        >>> codec = UniformCodec(shape=(3,), bits=4, low=0.0, high=1.5)
        >>> codes = torch.tensor([[1, 2, 15]], dtype=torch.int32)
        >>> codec.encode({"codes": codes, "low": torch.zeros(1), "high": torch.full((1,), 1.5)})[0].hex()
        '12f0'
    """

    kind: ClassVar[str] = "uniform"

    @functools.cached_property
    def payload_bytes(self) -> int:
        """Length of every payload in bytes, range parameters included."""
        return packed_bytes(self._count, self.bits) + (_RANGE_BYTES if self.low is None else 0)

    def check_lengths(self, payloads: Sequence[bytes]) -> None:
        """Raise :class:`CodecError` unless every payload has ``payload_bytes``."""
        check_length(payloads, self.payload_bytes)

    def pack(self, codes: npt.NDArray[np.uint16], ranges: npt.NDArray[np.float32]) -> list[bytes]:
        """Pack the codes (B, N) of each sample on their own."""
        return [row.tobytes() for row in pack_rows(codes, self.bits)]

    def unpack(self, bodies: Sequence[bytes], ranges: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Read the codes (B, N) back; :class:`CodecError` if the padding is not zero."""
        return unpack_rows(payload_rows(bodies, packed_bytes(self._count, self.bits)), self._count, self.bits)


def _checked_float(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CodecError(f"{name} must be a number, got {value!r}")
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    except (OverflowError, struct.error):
        rounded = math.inf
    if not math.isfinite(rounded):
        raise CodecError(f"{name} must be a finite float32, got {value!r:.100}")
    return float(rounded)


def usable_range(low: float, high: float) -> bool:
    """Whether two ends are finite, and so far within float32 that nothing decoded from between them overflows."""
    return bool(abs(low) <= RANGE_LIMIT and abs(high) <= RANGE_LIMIT)


def _check_ranges(ranges: npt.NDArray[np.floating]) -> None:
    # NaN compares as false.
    right = (np.abs(ranges) <= RANGE_LIMIT).all(axis=1) & (ranges[:, 0] <= ranges[:, 1])
    if not right.all():
        row = int(right.argmin())
        raise CodecError(
            f"the range of sample {row} must be finite, within ±{RANGE_LIMIT:.4g}, with low <= high, got "
            f"{ranges[row].tolist()}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


CODECS[UniformCodec.kind] = UniformCodec
