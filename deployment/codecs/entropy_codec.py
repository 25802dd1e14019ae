"""Integer codes as a range-coded bitstream whose length follows a learned prior."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checks import is_whole
from .codec import CODECS, Codec, bytes_of, check_batch_shape, checked_shape, named
from .coder import check_coder, stream
from .packing import CodecError, packed_bytes

TOTAL = 2**16
MAX_SYMBOLS = 2**12
CHECK_BYTES = 4
# Beyond this a code is no longer exact as a float32, which is what the server decodes it to.
MAX_CODE = 2**24
# As many table entries as a manifest can hold; a real prior has a few thousand.
_MAX_ENTRIES = 2**19
# The rarest symbol costs log2(TOTAL) = 16 bits, and a little where the coder rounds its interval.
_MOST_BITS = 17
# The coder counts in 2^24ths: each frequency stands for as many times 2^8 of them.
_UNIT = 2**8


@dataclasses.dataclass(frozen=True)
class EntropyCodec(Codec):
    """Range-coded integer codes under one table of frequencies per channel; every payload has a length of its own.

    A payload is the bitstream, then a CRC-32 (big-endian) over that bitstream and the codes as little-endian int32.
    The codes are coded channel after channel. The coder is a range coder (Martin, "Range encoding", 1979) with 64 bits
    of state and words of 32 bits, of which the bitstream keeps no more bytes than its last interval needs; the decoder
    continues it with zeros. The check covers the codes too, so that tables other than the sender's are found out like
    a damaged byte. ``docs/bundle.md`` says it bit by bit.

    What is coded are these very integers: a code of frequency f takes log2(65536 / f) bits, and no float decides
    anything, so both sides of an edge agree whatever their arithmetic. Needs the package ``constriction`` (Bamler,
    "Understanding Entropy Coding With Asymmetric Numeral Systems (ANS)", 2022), Cleave's extra ``entropy``, once
    something is coded.

    Args:
        shape: Shape of one sample's codes, without the batch.
        lows: The least code of each channel.
        frequencies: For each channel, the frequency of each code from the least one upwards: at least 1 each, 65536
            together, at most 4096 codes.
        axis: Where the channels stand in ``shape``: 0 for maps (C, H, W), -1 for tokens (L, C).

    Raises:
        CodecError: An argument is out of range or does not fit the others; the message names it and its value.

    Example:
        >>> codec = EntropyCodec(shape=(2, 2), lows=(-1, 0), frequencies=((16384, 32768, 16384), (65000, 536)))
        >>> payloads = codec.encode({"codes": torch.tensor([[[-1, 0], [0, 0]], [[1, 1], [1, 1]]])})
        >>> [len(payload) - CHECK_BYTES for payload in payloads]
        [1, 3]
        >>> codec.decode(payloads)["codes"].tolist()
        [[[-1, 0], [0, 0]], [[1, 1], [1, 1]]]
    """

    kind: ClassVar[str] = "entropy"
    sends: ClassVar[tuple[str, ...]] = ("codes",)
    delivers: ClassVar[tuple[str, ...]] = ("codes",)

    shape: tuple[int, ...]
    lows: tuple[int, ...]
    frequencies: tuple[tuple[int, ...], ...]
    axis: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))
        if not is_whole(self.axis) or self.axis not in (0, -1):
            raise CodecError(f"axis must be 0 (channels first) or -1 (channels last), got {self.axis!r:.100}")
        channels = self.shape[self.axis]
        object.__setattr__(self, "lows", _integers(self.lows, "lows", -MAX_CODE))
        if not isinstance(self.frequencies, Sequence) or isinstance(self.frequencies, str):
            raise CodecError(f"frequencies must hold one list for each channel, got {self.frequencies!r:.100}")
        for name in ("lows", "frequencies"):
            if len(getattr(self, name)) != channels:
                raise CodecError(
                    f"{name} must have one entry for each of the {channels} channels of shape {self.shape}, "
                    f"got {len(getattr(self, name))}"
                )
        object.__setattr__(self, "frequencies", _checked_frequencies(self.frequencies))
        for low, table in zip(self.lows, self.frequencies, strict=True):
            if low + len(table) - 1 > MAX_CODE:
                raise CodecError(f"codes must lie in ±{MAX_CODE}, got a table of {len(table)} from {low}")

    @classmethod
    def from_tables(
        cls, shape: tuple[int, ...], tables: Iterable[tuple[int, npt.NDArray[np.float64]]], axis: int = 0
    ) -> EntropyCodec:
        """Build a codec from each channel's least code and the probabilities of the codes from there upwards.

        Raises:
            CodecError: As the class, or a probability is negative or not finite.
        """
        pairs = list(tables)
        frequencies = tuple(integer_frequencies(probabilities) for _, probabilities in pairs)
        return cls(shape, tuple(int(low) for low, _ in pairs), frequencies, axis)

    @property
    def bits(self) -> NoReturn:  # type: ignore[override]
        """No such thing: :class:`CodecError`; :meth:`estimated_bits` says how long a sample's bitstream is."""
        raise CodecError("an entropy-coded edge has no width of codes: each code takes as many bits as it is rare")

    @property
    def settings(self) -> dict[str, Tensor]:
        """Nothing: the tables are fixed."""
        return {}

    @property
    def max_payload_bytes(self) -> int:
        """A length that no payload exceeds."""
        return packed_bytes(math.prod(self.shape), _MOST_BITS) + 1 + CHECK_BYTES

    def encode(self, tensors: Mapping[str, Tensor]) -> list[bytes]:
        """Turn codes int (B, *shape) into one payload per sample.

        Raises:
            CodecError: ``codes`` is missing or of the wrong shape or dtype, a code is not in its channel's table, or
                ``constriction`` is not installed.
        """
        codes = self._checked_codes(tensors)
        symbols = codes - self._lows
        payloads = []
        for sample, rows in zip(codes, symbols, strict=True):
            encoder = stream().queue.RangeEncoder()
            for row, model in zip(rows, self._models, strict=True):
                if model is not None:
                    encoder.encode(row, model)
            bitstream = _shortest(encoder)
            payloads.append(bitstream + _check(bitstream, sample))
        return payloads

    def decode(self, payloads: Sequence[bytes]) -> dict[str, Tensor]:
        """Turn B payloads into codes int32 (B, *shape).

        Raises:
            CodecError: A payload is cut short, altered, or was encoded with other tables; or ``constriction`` is not
                installed.
        """
        payloads = bytes_of(payloads)
        codes = np.empty((len(payloads), *self._channels_first), np.int32)
        for index, payload in enumerate(payloads):
            if not CHECK_BYTES <= len(payload) <= self.max_payload_bytes:
                raise CodecError(
                    f"payload {index} has {len(payload)} bytes, it must have {CHECK_BYTES} to "
                    f"{self.max_payload_bytes}: cut short or not this edge's"
                )
            bitstream = payload[:-CHECK_BYTES]
            if not self._read(bitstream, codes[index]) or _check(bitstream, codes[index]) != payload[-CHECK_BYTES:]:
                raise CodecError(
                    f"payload {index} is damaged: cut short, altered, or encoded with other tables; its check fails"
                )
        tensor = torch.from_numpy(codes).unflatten(2, self._positions).movedim(1, self._dim)
        return {"codes": tensor.reshape(len(payloads), *self.shape).contiguous()}

    def estimated_bits(self, codes: Tensor) -> Tensor:
        """Ideal length of each sample's bitstream under the tables, −Σ log2(frequency / 65536), float64 (B,).

        Raises:
            CodecError: As :meth:`encode`.
        """
        symbols = self._checked_codes({"codes": codes}) - self._lows
        bits = np.zeros(len(codes))
        for channel, table in enumerate(self.frequencies):
            bits -= np.log2(np.array(table) / TOTAL)[symbols[:, channel]].sum(axis=1)
        return torch.from_numpy(bits)

    def prepare(self) -> None:
        """Make the coder's models; :class:`CodecError` if ``constriction`` is not installed."""
        _ = self._models
        check_coder()

    def with_bits(self, bits: int) -> NoReturn:
        """Refuse: a prior is learned for the codes as they are, so there is no other width."""
        raise CodecError(
            f"this edge is entropy-coded under a learned prior, which knows no widths; leave bits out, got {bits}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "lows": list(self.lows),
            "frequencies": [list(table) for table in self.frequencies],
            "axis": self.axis,
        }

    def __getstate__(self) -> dict[str, Any]:
        # The coder's models are cached on the instance and can be neither copied nor pickled; they are made again.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def _dim(self) -> int:
        """Dimension of a batch of codes in which the channels stand."""
        return 1 if self.axis == 0 else len(self.shape)

    @property
    def _positions(self) -> tuple[int, ...]:
        """Shape of one channel of one sample; a channel of a flat vector has one position."""
        return (self.shape[1:] if self.axis == 0 else self.shape[:-1]) or (1,)

    @property
    def _channels_first(self) -> tuple[int, int]:
        return self.shape[self.axis], math.prod(self._positions)

    @functools.cached_property
    def _lows(self) -> npt.NDArray[np.int32]:
        return np.array(self.lows, np.int32)[:, None]

    @functools.cached_property
    def _models(self) -> list[Any]:
        """One model per channel, ``None`` where there is but one code and nothing to tell."""
        return [exact_model(table) if len(table) > 1 else None for table in self.frequencies]

    def _checked_codes(self, tensors: Mapping[str, Tensor]) -> npt.NDArray[np.int32]:
        """Return the codes (B, channels, positions); :class:`CodecError` unless each is in its channel's table."""
        (codes,) = named(tensors, self.sends)
        check_batch_shape("codes", codes, self.shape)
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise CodecError(f"codes must be integers, got {codes.dtype}")
        rows = codes.detach().cpu().movedim(self._dim, 1).reshape(len(codes), *self._channels_first).numpy()
        sizes = np.array([len(table) for table in self.frequencies])[:, None]
        outside = (rows < self._lows) | (rows >= self._lows + sizes)
        if outside.any():
            sample, channel, position = np.argwhere(outside)[0]
            low = self.lows[channel]
            raise CodecError(
                f"the codes of channel {channel} lie in {low}..{low + len(self.frequencies[channel]) - 1}, "
                f"sample {sample} has {rows[sample, channel, position]}"
            )
        return np.ascontiguousarray(rows, np.int32)

    def _read(self, bitstream: bytes, codes: npt.NDArray[np.int32]) -> bool:
        """Decode a bitstream into ``codes`` (channels, positions); False if no codes encode to it."""
        padding = -len(bitstream) % 4 + 8
        words = np.frombuffer(bitstream + bytes(padding), ">u4").astype(np.uint32)
        decoder = stream().queue.RangeDecoder(words)
        try:
            for row, model in zip(codes, self._models, strict=True):
                row[:] = 0 if model is None else decoder.decode(model, row.size)
        except AssertionError:  # the coder's word for data that its models cannot have made
            return False
        codes += self._lows
        return True


def integer_frequencies(probabilities: npt.ArrayLike) -> tuple[int, ...]:
    """Turn probabilities into the whole frequencies f of at least 1 with sum 65536 that code them in the fewest bits.

    They are those with the least expected length −Σ p·log2(f / 65536).

    Args:
        probabilities: 1 to 4096 values, at least 0 and with a positive sum, which need not be 1.

    Raises:
        CodecError: They are no such vector.

    Example:
        >>> integer_frequencies([0.5, 0.5, 0.0])
        (32768, 32767, 1)
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 1 or not 1 <= len(p) <= MAX_SYMBOLS or not (np.isfinite(p) & (p >= 0)).all() or p.sum() <= 0:
        raise CodecError(f"probabilities must be 1 to {MAX_SYMBOLS} values of at least 0, not all 0, got {p!r}")
    p = p / p.sum()
    # No more than the best share of any; what is missing goes where the next unit gains the most, -p·log2 being convex.
    frequencies = np.maximum(1, np.floor(p * (TOTAL - len(p)))).astype(int).tolist()
    gains = [(-q * math.log1p(1 / f), i) for i, (q, f) in enumerate(zip(p.tolist(), frequencies, strict=True))]
    heapq.heapify(gains)
    for _ in range(TOTAL - sum(frequencies)):
        i = gains[0][1]
        frequencies[i] += 1
        heapq.heapreplace(gains, (-p[i] * math.log1p(1 / frequencies[i]), i))
    return tuple(frequencies)


def exact_model(frequencies: Sequence[int]) -> Any:
    """Return the coder's model of a table, in which each symbol has exactly its share f / 65536.

    From weights w the coder makes its own whole numbers of 2^24ths: the n symbols get one each, and floor(w · scale)
    of what is left, summed up, with scale = (2^24 - n) / Σw. Weights 2^8·f - 1 sum to 2^24 - n, so the scale is 1, all
    sums are whole, and symbol s gets 2^8·f[s]: nothing is rounded.
    """
    weights = _UNIT * np.array(frequencies, np.float64) - 1
    return stream().model.Categorical(weights, perfect=False)


def _shortest(encoder: Any) -> bytes:
    """Return the fewest bytes that, continued with zeros, lie in the interval that a range encoder arrived at.

    The coder itself ends with whole 32-bit words, which is 1 to 4 % of the payloads there are here. Its state is the
    interval [low, low + width) as a binary fraction: ``lower`` holds the last 64 bits of low, and what it would emit
    is a point of the interval, which gives the bits before.
    """
    words = encoder.get_compressed()
    position, (lower, width) = encoder.pos()
    length = 4 * (position + 2)
    point = int.from_bytes(words.astype(">u4").tobytes(), "big") << 8 * (length - 4 * len(words))
    low = point - (point - lower) % 2**64
    high = low + width - 1
    if low == 0:
        return b""
    # The number with the most trailing zeros between two others keeps the digits that their ends share, and one more.
    zeros = ((low - 1) ^ high).bit_length() - 1
    return (high >> zeros << zeros).to_bytes(length, "big").rstrip(b"\0")


def _check(bitstream: bytes, codes: npt.NDArray[np.int32]) -> bytes:
    return zlib.crc32(codes.astype("<i4").tobytes(), zlib.crc32(bitstream)).to_bytes(CHECK_BYTES, "big")


def _integers(values: Any, name: str, least: int) -> tuple[int, ...]:
    entries = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if not entries or not all(is_whole(n) and n >= least for n in entries):
        raise CodecError(f"{name} must be whole numbers of at least {least}, got {values!r:.100}")
    return tuple(int(n) for n in entries)


def _checked_frequencies(tables: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    if sum(len(table) for table in tables if isinstance(table, Sequence)) > _MAX_ENTRIES:
        raise CodecError(f"frequencies may have {_MAX_ENTRIES} entries over all channels, got more")
    checked = tuple(_integers(table, f"frequencies[{i}]", 1) for i, table in enumerate(tables))
    for i, table in enumerate(checked):
        if len(table) > MAX_SYMBOLS or sum(table) != TOTAL:
            raise CodecError(
                f"frequencies[{i}] must be at most {MAX_SYMBOLS} numbers that sum to {TOTAL}, "
                f"got {len(table)} that sum to {sum(table)}"
            )
    return checked


CODECS[EntropyCodec.kind] = EntropyCodec
