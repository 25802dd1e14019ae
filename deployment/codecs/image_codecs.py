"""The picture itself as the payload: JPEG, WebP and PNG without the headers that both sides know.

They are the baselines of split computing: the device runs no network and sends its picture to the whole one
(Matsubara et al., "SC2 Benchmark: Supervised Compression for Split Computing", 2023).
"""

from __future__ import annotations

import abc
import binascii
import dataclasses
import functools
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import is_whole
from ..naming import did_you_mean
from ..runtime.preprocess import COLOR_MODES, MAX_PIXELS
from .jpeg_scan import END_OF_IMAGE, check_scan, header_length
from .packing import CodecError

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
# WebP's limit (RFC 9649, section 3.4); the other formats have larger ones.
_MAX_SIDE = 16_383
_MODES = {channels: mode for mode, channels in COLOR_MODES.items()}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHECK_BYTES = 2


@dataclasses.dataclass(frozen=True)
class ImageCodec(abc.ABC):
    """Turns pictures of one shape into payloads, and payloads into pictures.

    A payload leaves out what both sides know without it: size, colour mode, and what follows from format and quality.
    :meth:`file` puts it back.

    Args:
        shape: (C, H, W) of a picture, with 1 channel for grey or 3 for RGB.
        quality: 1 to 100 for a lossy form, ``None`` for a lossless one.

    Attributes:
        format: Pillow's name of the format.
        has_lossy: Whether the format has a lossy form.
        has_lossless: Whether the format has a lossless form.

    Raises:
        CodecError: An argument is out of range; the message names it and its value.
    """

    format: ClassVar[str]
    has_lossy: ClassVar[bool] = True
    has_lossless: ClassVar[bool] = True
    shape: tuple[int, int, int]
    quality: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _checked_shape(self.shape))
        if self.quality is None and not self.has_lossless:
            raise CodecError(f"{self.format} has no lossless form: give a quality, 1 to 100")
        if self.quality is not None and not self.has_lossy:
            raise CodecError(f"{self.format} is lossless: quality={self.quality!r} has no meaning, leave it out")
        if self.quality is not None and not (is_whole(self.quality) and 1 <= self.quality <= 100):
            raise CodecError(f"quality must be a whole number, 1 to 100, got {self.quality!r:.100}")

    @property
    def lossless(self) -> bool:
        """Whether the picture that arrives is exactly the one that was sent."""
        return self.quality is None

    def encode(self, image: Tensor) -> bytes:
        """Turn a picture uint8 (C, H, W) into its payload.

        Raises:
            CodecError: The picture has another dtype or shape, or Pillow wrote a file of another layout than expected.
        """
        if image.dtype != torch.uint8 or tuple(image.shape) != self.shape:
            raise CodecError(f"the image must be uint8 {self.shape}, got {image.dtype} {tuple(image.shape)}")
        pixels = image.detach().cpu().permute(1, 2, 0).contiguous().numpy()
        payload = self._payload(_save(Image.fromarray(pixels.squeeze(2) if len(image) == 1 else pixels), self))
        if payload is None:
            raise CodecError(f"Pillow {Image.__version__} wrote a {self.format} file whose headers are not constant")
        return payload

    def decode(self, payload: bytes) -> Tensor:
        """Turn a payload into the picture, uint8 (C, H, W).

        Raises:
            CodecError: The payload is damaged: cut short, too long, or not what the format allows. An alteration that
                leaves a JPEG scan well formed goes unseen: it has no checksum.
        """
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise CodecError(f"a {self.format} payload must be bytes, got {type(payload).__name__}")
        payload = bytes(payload)
        channels, height, width = self.shape
        # More than any of the formats spends on noise; what is longer is not worth a look.
        if len(payload) > (limit := 1024 + 8 * channels * (height + 15) * (width + 15)):
            raise CodecError(f"a {self.format} payload of {len(payload)} bytes is longer than {limit}: it is damaged")
        file = self.file(payload)
        try:
            with Image.open(io.BytesIO(file), formats=[self.format]) as picture:
                if picture.size != (width, height):
                    raise CodecError(f"it is a picture of {picture.size} pixels instead of {(width, height)}")
                pixels = np.array(picture.convert(_MODES[channels]))
        # Pillow's decoders answer broken data with almost any exception: OSError, SyntaxError, struct.error, …
        except Exception as error:
            raise CodecError(f"a {self.format} payload of {len(payload)} bytes is damaged: {error}") from error
        return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1).contiguous()

    @abc.abstractmethod
    def file(self, payload: bytes) -> bytes:
        """Return the whole image file of a payload; :class:`CodecError` if the payload is damaged."""

    @abc.abstractmethod
    def _options(self) -> dict[str, Any]:
        """What Pillow is to be told when it saves."""

    @abc.abstractmethod
    def _payload(self, file: bytes) -> bytes | None:
        """Take the payload out of a file; ``None`` if the rest of the file is not the constant that it should be."""


@dataclasses.dataclass(frozen=True)
class JPEGCodec(ImageCodec):
    """Baseline JPEG: the payload is the entropy-coded scan alone.

    Quantisation tables follow from the quality and the Huffman tables are the standard's own (ITU-T T.81, Annex K), so
    that everything before the scan is a constant: 623 bytes for RGB, more than the picture itself where it is small.
    Huffman tables optimised for each picture would have to be sent with it and are not offered.

    Args:
        shape: (C, H, W) of a picture, with 1 channel for grey or 3 for RGB.
        quality: 1 to 100.
        subsampling: Of the colours: ``4:4:4`` (none), ``4:2:2`` or ``4:2:0``; grey has none.

    Raises:
        CodecError: An argument is out of range; the message names it and its value.

    Example:
        >>> codec = JPEGCodec((1, 16, 16), quality=50)
        >>> payload = codec.encode(torch.full((1, 16, 16), 200, dtype=torch.uint8))
        >>> len(payload), len(codec.file(payload)), codec.decode(payload).unique().item()
        (4, 334, 200)
    """

    format: ClassVar[str] = "JPEG"
    has_lossless: ClassVar[bool] = False
    subsampling: str = "4:2:0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subsampling not in SUBSAMPLINGS:
            raise CodecError(f"subsampling must be one of {', '.join(SUBSAMPLINGS)}, got {self.subsampling!r}")

    @property
    def header(self) -> bytes:
        """What stands before the scan in every file of this codec."""
        return _jpeg_header(self)

    def file(self, payload: bytes) -> bytes:
        """Return the whole image file of a payload; :class:`CodecError` unless the payload is exactly one scan."""
        check_scan(payload, self.header)
        return self.header + payload + END_OF_IMAGE

    def _options(self) -> dict[str, Any]:
        return {"quality": self.quality, "subsampling": self.subsampling if self.shape[0] == 3 else "4:4:4"}

    def _payload(self, file: bytes) -> bytes | None:
        if not file.startswith(self.header) or not file.endswith(END_OF_IMAGE):
            return None
        return file[len(self.header) : -len(END_OF_IMAGE)]


@dataclasses.dataclass(frozen=True)
class WebPCodec(ImageCodec):
    """WebP, lossy or lossless: the payload is the bitstream without its container (RFC 9649, sections 2.5 and 2.6).

    A lossy payload also lacks start code and size in the VP8 frame header (RFC 6386, section 9.1), 27 bytes in all; a
    lossless one signature and size, 25 bytes in all. Without the lengths in the container libwebp answers some
    shortened streams with a wrong picture, so a CRC-16 stands in their place: 2 bytes. Grey pictures are sent as
    colours without colour: WebP knows no others.

    Args:
        shape: (C, H, W) of a picture, with 1 channel for grey or 3 for RGB.
        quality: 1 to 100; ``None`` for lossless.

    Raises:
        CodecError: An argument is out of range; the message names it and its value.

    Example:
        >>> codec = WebPCodec((3, 16, 16))
        >>> payload = codec.encode(torch.full((3, 16, 16), 200, dtype=torch.uint8))
        >>> len(codec.file(payload)) - len(payload), codec.decode(payload).unique().item()
        (24, 200)
    """

    format: ClassVar[str] = "WEBP"

    def file(self, payload: bytes) -> bytes:
        """Return the whole image file of a payload; :class:`CodecError` if it fails its checksum."""
        rest, check = payload[:-_CHECK_BYTES], payload[-_CHECK_BYTES:]
        if _checksum(rest) != check:
            raise CodecError(f"a WEBP payload of {len(payload)} bytes fails its checksum: it is cut short or damaged")
        stream = rest[: self._constant_at] + self._constant + rest[self._constant_at :]
        return _riff(b"VP8L" if self.lossless else b"VP8 ", stream)

    @property
    def _constant_at(self) -> int:
        """Where in the bitstream the constant stands: a VP8 frame begins with a tag of three bytes."""
        return 0 if self.lossless else 3

    @property
    def _constant(self) -> bytes:
        """Signature or start code, and the picture's size."""
        _, height, width = self.shape
        if self.lossless:
            return b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14)
        return b"\x9d\x01\x2a" + struct.pack("<HH", width, height)

    def _options(self) -> dict[str, Any]:
        # The slowest method makes the smallest lossy pictures; of lossless ones no method is best everywhere.
        return {"lossless": True, "method": 4} if self.lossless else {"quality": self.quality, "method": 6}

    def _payload(self, file: bytes) -> bytes | None:
        stream = file[20 : 20 + int.from_bytes(file[16:20], "little")]
        rest = stream[: self._constant_at] + stream[self._constant_at + len(self._constant) :]
        payload = rest + _checksum(rest)
        return payload if self.file(payload) == file else None


@dataclasses.dataclass(frozen=True)
class PNGCodec(ImageCodec):
    """PNG: the payload is the zlib stream of the picture, which ends with a checksum of its own.

    Signature, image header, chunk headers and the end are constant: 57 bytes.

    Args:
        shape: (C, H, W) of a picture, with 1 channel for grey or 3 for RGB.
        quality: ``None``: PNG is lossless.

    Raises:
        CodecError: An argument is out of range; the message names it and its value.

    Example:
        >>> codec = PNGCodec((3, 16, 16))
        >>> payload = codec.encode(torch.full((3, 16, 16), 200, dtype=torch.uint8))
        >>> len(codec.file(payload)) - len(payload), codec.decode(payload).unique().item()
        (57, 200)
    """

    format: ClassVar[str] = "PNG"
    has_lossy: ClassVar[bool] = False

    def file(self, payload: bytes) -> bytes:
        """Return the whole image file of a payload; :class:`CodecError` unless it is one whole zlib stream."""
        channels, height, width = self.shape
        length = height * (1 + width * channels)
        stream = zlib.decompressobj()
        try:
            found = len(stream.decompress(payload, length + 1))
        except zlib.error as error:
            raise CodecError(f"a PNG payload of {len(payload)} bytes is damaged: {error}") from error
        if found != length or not stream.eof or stream.unused_data:
            raise CodecError(f"a PNG payload of {len(payload)} bytes is cut short or damaged")
        return self._header + _chunk(b"IDAT", payload) + _chunk(b"IEND", b"")

    @property
    def _header(self) -> bytes:
        channels, height, width = self.shape
        kind = 2 if channels == 3 else 0
        return _PNG_SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))

    def _options(self) -> dict[str, Any]:
        return {"optimize": True}

    def _payload(self, file: bytes) -> bytes | None:
        if not file.startswith(self._header):
            return None
        # A large picture's stream comes in several chunks; the payload is the one stream.
        payload, position = b"", len(self._header)
        while file[position + 4 : position + 8] == b"IDAT":
            end = position + 8 + int.from_bytes(file[position : position + 4], "big")
            payload += file[position + 8 : end]
            position = end + 4
        return payload if file[position:] == _chunk(b"IEND", b"") else None


IMAGE_CODECS: dict[str, type[ImageCodec]] = {"jpeg": JPEGCodec, "webp": WebPCodec, "png": PNGCodec}


def image_codec(format: str, shape: Sequence[int], quality: int | None = None) -> ImageCodec:  # noqa: A002
    """Build an image codec.

    Args:
        format: ``jpeg``, ``webp`` or ``png``.
        shape: (C, H, W) of a picture, with 1 channel for grey or 3 for RGB.
        quality: 1 to 100; ``None`` for lossless.

    Raises:
        CodecError: The format is unknown or lacks what ``quality`` asks for, or an argument is out of range.
    """
    if not isinstance(format, str) or format not in IMAGE_CODECS:
        close = did_you_mean(format, IMAGE_CODECS)
        raise CodecError(f"format must be one of {', '.join(IMAGE_CODECS)}, got {format!r:.100}.{close}")
    return IMAGE_CODECS[format](tuple(shape), quality)  # type: ignore[arg-type]


def _save(picture: Image.Image, codec: ImageCodec) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, codec.format, **codec._options())
    return buffer.getvalue()


@functools.lru_cache(maxsize=64)
def _jpeg_header(codec: JPEGCodec) -> bytes:
    channels, height, width = codec.shape
    file = _save(Image.new(_MODES[channels], (width, height)), codec)
    return file[: header_length(file)]


def _riff(kind: bytes, stream: bytes) -> bytes:
    """A WebP file of one chunk, padded to an even length."""
    chunk = kind + struct.pack("<I", len(stream)) + stream + bytes(len(stream) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def _chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _checksum(payload: bytes) -> bytes:
    # Inverted, else a payload and the same one with a zero behind it would both fit.
    return struct.pack(">H", binascii.crc_hqx(payload, 0xFFFF) ^ 0xFFFF)


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if len(sizes) != 3 or sizes[0] not in _MODES or not all(is_whole(n) and 1 <= n <= _MAX_SIDE for n in sizes):
        raise CodecError(f"shape must be (1 or 3, H, W) with sides of 1 to {_MAX_SIDE} pixels, got {shape!r:.100}")
    if sizes[1] * sizes[2] > MAX_PIXELS:
        raise CodecError(f"a picture of shape {sizes} has more than {MAX_PIXELS} pixels")
    return sizes
