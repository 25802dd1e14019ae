"""Integer codes of 2 to 16 bits as dense bytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor

from ..checks import is_whole

MIN_BITS, MAX_BITS, FLOAT_BITS = 2, 16, 32

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_INTEGERS = (torch.int32, torch.uint8, torch.int8, torch.int16, torch.int64)


class CodecError(ValueError):
    """Tensors that cannot be encoded, a payload that cannot be decoded, or a codec that cannot be described so."""


class PayloadError(CodecError):
    """Some samples of a batch could not be encoded or decoded; all others went on.

    Attributes:
        errors: What is wrong, by the sample's row in the request.
        outcome: What became of all others: an :class:`~cleave.deployment.Outcome` of a side, a
            :class:`~cleave.deployment.Result` of a pipeline.
    """

    def __init__(self, errors: Mapping[int, CodecError], outcome: Any) -> None:
        first = next(iter(errors))
        named = ", ".join(map(str, list(errors)[:10])) + (", …" if len(errors) > 10 else "")
        super().__init__(
            f"{len(errors)} of the samples failed, those of rows {named}; the others' results are in this error's "
            f"outcome. Row {first}: {errors[first]}"
        )
        self.errors, self.outcome = dict(errors), outcome


def check_bits(bits: int) -> int:
    """Return ``bits`` if it is a width that codes may have: 2 to 16, or 32, which means float32 without codes.

    Raises:
        ValueError: ``bits`` is anything else.
    """
    if not is_whole(bits):
        raise CodecError(
            f"bits must be an integer, {MIN_BITS} to {MAX_BITS} or {FLOAT_BITS} (float), got {bits!r:.100}"
        )
    if not MIN_BITS <= bits <= MAX_BITS and bits != FLOAT_BITS:
        raise CodecError(f"bits must be {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for float, got {bits}")
    return int(bits)


def check_code_bits(bits: int) -> int:
    """Return ``bits`` if codes can have that width, 2 to 16; ValueError otherwise."""
    if check_bits(bits) == FLOAT_BITS:
        raise CodecError(f"bits={bits} means float: integer codes have {MIN_BITS} to {MAX_BITS} bits")
    return int(bits)


def pack_bits(codes: Tensor, bits: int) -> bytes:
    """Pack integer codes densely, the most significant bit of each code first.

    Args:
        codes: Integer tensor (N,), each in 0..2**bits-1.
        bits: Width of a code, 2 to 16.

    Returns:
        ceil(N·bits/8) bytes; the unused low bits of the last byte are zero.

    Raises:
        ValueError: ``bits`` is out of range, ``codes`` is not a vector of integers, or a code does not fit.
    """
    check_code_bits(bits)
    if codes.ndim != 1:
        raise CodecError(f"codes must be a vector, got shape {tuple(codes.shape)}")
    return pack_rows(checked_codes(codes[None], bits), bits).tobytes()


def unpack_bits(payload: bytes, count: int, bits: int) -> Tensor:
    """Read back what :func:`pack_bits` wrote.

    Args:
        payload: ceil(count·bits/8) bytes.
        count: Number of codes N.
        bits: Width of a code, 2 to 16.

    Returns:
        int32 tensor (N,).

    Raises:
        ValueError: ``bits`` is out of range, the payload's length is wrong, or its padding is not zero.
    """
    check_code_bits(bits)
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise CodecError(f"the payload must be bytes, got {type(payload).__name__}")
    payload = bytes(payload)
    if len(payload) != packed_bytes(count, bits):
        raise CodecError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, the payload has {len(payload)}"
        )
    return torch.from_numpy(unpack_rows(np.frombuffer(payload, np.uint8)[None], count, bits)[0])


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take: ceil(count·bits/8)."""
    return -(-count * bits // 8)


def zstd_bytes(payload: bytes) -> int:
    """Length in bytes of ``payload`` after Zstandard level 1, as one frame."""
    return len(zstandard.ZstdCompressor(level=1).compress(payload))


def pack_rows(codes: npt.NDArray[np.uint16], bits: int) -> npt.NDArray[np.uint8]:
    """Pack each row of (B, N) on its own into (B, ceil(N·bits/8))."""
    batch, count = codes.shape
    if 8 % bits == 0:
        return _pack_whole(codes, bits)
    # Eight codes fill ``bits`` whole bytes, so that one loop over their places does for all groups of eight.
    groups = -(-count // 8)
    columns = np.zeros((8, batch, groups), np.uint32)
    for place in range(8):
        column = codes[:, place::8]
        columns[place, :, : column.shape[1]] = column
    packed = np.zeros((batch, groups, bits), np.uint8)
    for place, byte, shift in _overlaps(bits):
        piece = columns[place] >> shift if shift >= 0 else columns[place] << -shift
        packed[..., byte] |= piece.astype(np.uint8)
    return packed.reshape(batch, groups * bits)[:, : packed_bytes(count, bits)]


def unpack_rows(rows: npt.NDArray[np.uint8], count: int, bits: int) -> npt.NDArray[np.int32]:
    """Read (B, ceil(N·bits/8)) back into codes (B, N)."""
    batch, length = rows.shape
    unused = 8 * length - count * bits
    if unused and np.any(rows[:, -1] & ((1 << unused) - 1)):
        raise CodecError(f"the last {unused} bits of the payload are padding and must be zero: it is damaged")
    if 8 % bits == 0:
        return _unpack_whole(rows, count, bits)
    groups = -(-count // 8)
    packed = np.zeros((bits, batch, groups), np.int32)
    for byte in range(bits):
        column = rows[:, byte::bits]
        packed[byte, :, : column.shape[1]] = column
    codes = np.zeros((batch, groups, 8), np.int32)
    for place, byte, shift in _overlaps(bits):
        codes[..., place] |= packed[byte] << shift if shift >= 0 else packed[byte] >> -shift
    return np.ascontiguousarray((codes & ((1 << bits) - 1)).reshape(batch, groups * 8)[:, :count])


def _pack_whole(codes: npt.NDArray[np.uint16], bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes of which a whole number fills a byte: the same bytes, in a few operations."""
    batch, count = codes.shape
    each = 8 // bits
    narrow = codes.astype(np.uint8)
    if count % each:
        narrow = np.concatenate([narrow, np.zeros((batch, -count % each), np.uint8)], axis=1)
    packed: npt.NDArray[np.uint8] = narrow[:, ::each] << np.uint8(8 - bits)
    for place in range(1, each):
        packed |= narrow[:, place::each] << np.uint8(8 - bits * (place + 1))
    return packed


def _unpack_whole(rows: npt.NDArray[np.uint8], count: int, bits: int) -> npt.NDArray[np.int32]:
    codes = _codes_of_bytes(bits).take(rows, axis=0).reshape(len(rows), rows.shape[1] * (8 // bits))
    return codes if codes.shape[1] == count else np.ascontiguousarray(codes[:, :count])


@functools.cache
def _codes_of_bytes(bits: int) -> npt.NDArray[np.int32]:
    """The codes in each of the 256 bytes, where a whole number of them fills a byte."""
    shifts = np.arange(8 - bits, -1, -bits)
    return (np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)).astype(np.int32)


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """Which byte of a group of eight codes holds part of which code, and how far the code is shifted down for it."""
    return [
        (place, byte, (place + 1) * bits - (byte + 1) * 8)
        for place in range(8)
        for byte in range(place * bits // 8, ((place + 1) * bits - 1) // 8 + 1)
    ]


def checked_codes(codes: Tensor, bits: int) -> npt.NDArray[np.uint16]:
    """Return integer codes as uint16; :class:`CodecError` for another dtype or a code outside 0..2**bits-1."""
    if codes.dtype not in _INTEGERS:
        raise CodecError(f"codes must be integers, got {codes.dtype}")
    values = codes.numpy(force=True)
    # Read as unsigned, a negative code is a large one; all bits that occur together exceed what no code exceeds alone.
    if np.bitwise_or.reduce(values.view(_UNSIGNED[values.itemsize]), axis=None) >= 1 << bits:
        raise CodecError(
            f"codes of {bits} bits lie in 0..{2**bits - 1}, got values from {values.min()} to {values.max()}"
        )
    return values.astype(np.uint16)
