"""Other ways to send the integer codes of a feature map: sparsely, and through zstd."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zstandard
from torch import Tensor

from ..checks import is_whole
from ..naming import did_you_mean
from .codec import CODECS, Codec, bytes_of, codec_from_dict
from .packing import CodecError
from .uniform import CodesCodec, UniformCodec

_Bits = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class SparseCodec(CodesCodec):
    """Codes of which many are zero's, as ReLU leaves them: a map of the others' places, then these codes.

    Zero-value compression (Rhu et al., "Compressing DMA Engine: Leveraging Activation Sparsity for Training Deep Neural
    Networks", 2018): of N codes of b bits, k of them not zero's, a body has 1 + N + k·b bits, or 1 + N·b where that is
    no more; the first bit says which. Zero's code is that of the sample's range, so it is 0 where the range begins at
    zero. The last byte is filled up with zeros.

    Args:
        shape: Shape of one sample's codes, without the batch.
        bits: Width of a code, 2 to 16.
        low: Lower end of the range all samples share; with ``high``. ``None`` sends each sample's own range.
        high: Upper end of that range.

    Raises:
        ValueError: An argument is out of range; the message names it and its value.

    Example:
        >>> import torch
        >>> codec = SparseCodec(shape=(8,), bits=4, low=0.0, high=1.5)
        >>> codes = torch.tensor([[0, 0, 0, 15, 0, 0, 0, 1]], dtype=torch.int32)
        >>> (payload,) = codec.encode({"codes": codes, "low": torch.zeros(1), "high": torch.full((1,), 1.5)})
        >>> " ".join(f"{byte:08b}" for byte in payload)
        '10001000 11111000 10000000'
    """

    kind: ClassVar[str] = "sparse"

    def pack(self, codes: npt.NDArray[np.uint16], ranges: npt.NDArray[np.float32]) -> list[bytes]:
        """Pack the codes (B, N) of each sample on their own, in the shorter of the two forms."""
        return [self._pack_row(row, zero) for row, zero in zip(codes, self._zeros(ranges), strict=True)]

    def unpack(self, bodies: Sequence[bytes], ranges: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Read the codes (B, N) back; :class:`CodecError` unless each body is as :meth:`pack` writes it."""
        rows = np.zeros((len(bodies), math.prod(self.shape)), np.int32)
        for index, (body, zero) in enumerate(zip(bodies, self._zeros(ranges), strict=True)):
            row = self._unpack_row(body, zero)
            # One spelling per value: padding, a zero sent as another code and a needless map are found at once.
            if row is None or self._pack_row(row, zero) != body:
                raise CodecError(f"payload {index} of {len(body)} bytes is cut short or damaged")
            rows[index] = row
        return rows

    def _zeros(self, ranges: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Zero's code in each range (B, 2), computed alike on both sides: IEEE leaves no choice in these operations."""
        low, high = ranges.astype(np.float64).T
        width = np.where(high > low, high - low, 1.0)
        return np.rint(np.clip(-low / width, 0.0, 1.0) * (self.levels - 1)).astype(np.int64)

    def _pack_row(self, codes: npt.NDArray[np.integer], zero: np.int64) -> bytes:
        kept = codes != zero
        sparse = len(codes) + int(kept.sum()) * self.bits < len(codes) * self.bits
        parts = [kept.astype(np.uint8), self._digits(codes[kept])] if sparse else [self._digits(codes)]
        return np.packbits(np.concatenate([np.array([sparse], np.uint8), *parts])).tobytes()

    def _unpack_row(self, body: bytes, zero: np.int64) -> npt.NDArray[np.int32] | None:
        count = math.prod(self.shape)
        if len(body) > 1 + count * self.bits // 8:
            return None
        bits = np.unpackbits(np.frombuffer(body, np.uint8))
        sparse = bool(len(bits) and bits[0])
        kept = bits[1 : 1 + count].astype(bool) if sparse else np.ones(count, bool)
        start = 1 + count if sparse else 1
        digits = bits[start : start + int(kept.sum()) * self.bits]
        if len(kept) != count or len(digits) != kept.sum() * self.bits:
            return None
        row = np.full(count, zero, np.int32)
        row[kept] = digits.reshape(-1, self.bits) @ (1 << np.arange(self.bits)[::-1])
        return row

    def _digits(self, codes: npt.NDArray[np.integer]) -> _Bits:
        """The binary digits of each code, the most significant first."""
        return (codes[:, None] >> np.arange(self.bits)[::-1] & 1).astype(np.uint8).ravel()


@dataclasses.dataclass(frozen=True)
class ZstdCodec(Codec):
    """Another codec's payloads, each compressed on its own as a Zstandard frame (RFC 8878) without its magic number.

    Args:
        inner: The other codec; or its :meth:`~cleave.deployment.codecs.codec.Codec.to_dict`, as a manifest holds it.
        level: Effort, 1 to 22.

    Raises:
        ValueError: ``inner`` is no codec, or itself of this kind; ``level`` is out of range.

    Example:
        >>> import torch
        >>> codec = ZstdCodec(UniformCodec(shape=(100,), bits=8, low=0.0, high=1.0))
        >>> sent = {"codes": torch.zeros(1, 100).int(), "low": torch.zeros(1), "high": torch.ones(1)}
        >>> len(codec.inner.encode(sent)[0]), len(codec.encode(sent)[0])
        (100, 13)
    """

    kind: ClassVar[str] = "zstd"
    inner: Codec
    level: int = 1

    def __post_init__(self) -> None:
        kind = self.inner.get("kind") if isinstance(self.inner, Mapping) else getattr(self.inner, "kind", None)
        if kind == self.kind:
            raise CodecError("inner must be another codec than zstd: what is compressed once does not shrink again")
        if isinstance(self.inner, Mapping):
            object.__setattr__(self, "inner", codec_from_dict(self.inner))
        if not isinstance(self.inner, Codec):
            raise CodecError(f"inner must be a codec, got {self.inner!r:.100}")
        if not is_whole(self.level) or not 1 <= self.level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise CodecError(
                f"level must be a whole number, 1 to {zstandard.MAX_COMPRESSION_LEVEL}, got {self.level!r:.100}"
            )

    @property
    def sends(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the inner codec sends."""
        return self.inner.sends

    @property
    def delivers(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the inner codec delivers."""
        return self.inner.delivers

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The inner codec's shape."""
        return self.inner.shape

    @property
    def bits(self) -> int:  # type: ignore[override]
        """The inner codec's width."""
        return self.inner.bits

    @property
    def whole(self) -> bool:
        """As the inner codec."""
        return self.inner.whole

    @property
    def levels(self) -> int:
        """The inner codec's levels."""
        return self.inner.levels

    @property
    def lossless(self) -> bool:
        """Whether the inner codec is lossless."""
        return self.inner.lossless

    @property
    def settings(self) -> dict[str, Tensor]:
        """The inner codec's settings."""
        return self.inner.settings

    def encode(self, tensors: Mapping[str, Tensor]) -> list[bytes]:
        """Encode and compress; :class:`CodecError` as of the inner codec."""
        return [self._compressed(payload) for payload in self.inner.encode(tensors)]

    def decode(self, payloads: Sequence[bytes]) -> dict[str, Tensor]:
        """Decompress and decode.

        Raises:
            CodecError: A payload is not one whole frame, or claims more bytes than any codec needs for its shape; or
                as of the inner codec.
        """
        return self.inner.decode(list(self._decompressed(bytes_of(payloads))))

    def _compressed(self, payload: bytes) -> bytes:
        # A level's parameters depend on the length: those for long inputs compress short ones worse.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            self.level, source_size=len(payload), format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=True
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(payload)

    def _decompressed(self, payloads: Sequence[bytes]) -> Iterator[bytes]:
        limit = 4096 + 16 * math.prod(self.shape)
        decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
        for index, payload in enumerate(payloads):
            try:
                frame = zstandard.get_frame_parameters(payload, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
                # The frame says how much memory it wants, before a byte of it is decompressed.
                if frame.content_size > limit:
                    raise CodecError(f"payload {index} claims {frame.content_size} bytes, more than {limit}")
                yield decompressor.decompress(payload, allow_extra_data=False)
            except zstandard.ZstdError as error:
                raise CodecError(
                    f"payload {index} of {len(payload)} bytes is not one whole zstd frame: {error}"
                ) from error

    def prepare(self) -> None:
        """Prepare the inner codec."""
        self.inner.prepare()

    def with_bits(self, bits: int) -> ZstdCodec:
        """Return this codec around the inner one at another width."""
        return dataclasses.replace(self, inner=self.inner.with_bits(bits))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inner codec's among them."""
        return {"kind": self.kind, "inner": self.inner.to_dict(), "level": self.level}


_FORMATS = {"tiled_png": "png", "tiled_webp": "webp", "tiled_jpeg": "jpeg"}
_ZSTD = "_zstd"
CODINGS = tuple(name + suffix for suffix in ("", _ZSTD) for name in ("packed", "sparse", *_FORMATS))


def code_codec(
    coding: str,
    shape: Sequence[int],
    bits: int,
    low: float | None = None,
    high: float | None = None,
    quality: int | None = None,
) -> Codec:
    """Build a codec of integer codes by the name of its coding.

    Args:
        coding: ``packed`` (dense, ``UniformCodec``), ``sparse``, ``tiled_png``, ``tiled_webp``
            or ``tiled_jpeg``; with ``_zstd`` behind it, compressed by zstd on top.
        shape: Shape of one sample's codes, without the batch; (C, H, W) where they are tiled.
        bits: Width of a code, 2 to 16, or to 8 where they are tiled.
        low: Lower end of the range all samples share; with ``high``. ``None`` sends each sample's own range.
        high: Upper end of that range.
        quality: Of ``tiled_jpeg`` and ``tiled_webp``, 1 to 100; ``None`` is lossless, which JPEG is not.

    Raises:
        ValueError: The coding is unknown or has no quality, or an argument is out of range.

    Example:
        >>> code_codec("tiled_webp", (8, 8, 8), bits=4, quality=50).lossless
        False
    """
    if coding not in CODINGS:
        close = did_you_mean(coding, CODINGS)
        raise CodecError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}.{close}")
    name = coding.removesuffix(_ZSTD)
    if quality is not None and name not in _FORMATS:
        raise CodecError(f"quality={quality!r} has no meaning for coding={coding!r}, which is lossless; leave it out")
    codec: CodesCodec
    if name in _FORMATS:
        from .tiled_image import TiledImageCodec  # here, so that nobody else loads the image codecs

        codec = TiledImageCodec(tuple(shape), bits, low, high, format=_FORMATS[name], quality=quality)
    else:
        codec = (SparseCodec if name == "sparse" else UniformCodec)(tuple(shape), bits, low, high)
    return ZstdCodec(codec) if coding.endswith(_ZSTD) else codec


CODECS.update({codec.kind: codec for codec in (SparseCodec, ZstdCodec)})
