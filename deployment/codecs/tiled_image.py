"""The channels of a feature map as the tiles of one grey image, sent by an image codec."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from .codec import CODECS
from .image_codecs import ImageCodec, image_codec
from .packing import CodecError
from .uniform import CodesCodec


@dataclasses.dataclass(frozen=True)
class TiledImageCodec(CodesCodec):
    """The channels of a map side by side in one grey image, sent by an image codec.

    Choi & Bajić ("Deep Feature Compression for Collaborative Object Detection", 2018) quantise to 8 bits and tile C
    channels into 2^⌈½·log2 C⌉ columns and 2^⌊½·log2 C⌋ rows; where C is no power of two there are as many rows as it
    takes, and empty tiles are black. A lossless format sends the codes as they are; a lossy one sees them spread over
    0 to 255, and what arrives is rounded to the nearest code. Its encoder may choose other bytes, and so other codes,
    in another version of Pillow.

    Args:
        shape: (C, H, W) of one sample's codes.
        bits: Width of a code, 2 to 8.
        low: Lower end of the range all samples share; with ``high``. ``None`` sends each sample's own range.
        high: Upper end of that range.
        format: ``png``, ``webp`` or ``jpeg``.
        quality: 1 to 100 for a lossy form; ``None`` for a lossless one.

    Raises:
        ValueError: An argument is out of range; the message names it and its value.

    Example:
        >>> codec = TiledImageCodec(shape=(8, 4, 4), bits=4, low=0.0, high=1.5)
        >>> codec.grid, codec.image.shape
        ((2, 4), (1, 8, 16))
        >>> codes = torch.arange(128).view(1, 8, 4, 4) % 16
        >>> sent = {"codes": codes, "low": torch.zeros(1), "high": torch.full((1,), 1.5)}
        >>> torch.equal(codec.decode(codec.encode(sent))["codes"], codes)
        True
    """

    kind: ClassVar[str] = "tiled_image"
    format: str = "png"
    quality: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shape) != 3:
            raise CodecError(f"only a map (C, H, W) can be tiled into an image, got codes of shape {self.shape}")
        if self.bits > 8:
            raise CodecError(f"a pixel has 8 bits: bits must be 2 to 8 for codes sent as an image, got {self.bits}")
        _ = self.image  # refuses a format, quality or size that cannot be

    @property
    def lossless(self) -> bool:
        """Whether the codes that arrive are exactly those that were sent."""
        return self.image.lossless

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        columns = 2 ** math.ceil(math.log2(self.shape[0]) / 2)
        return -(-self.shape[0] // columns), columns

    @property
    def image(self) -> ImageCodec:
        """The codec of the grey image."""
        (rows, columns), (_, height, width) = self.grid, self.shape
        return image_codec(self.format, (1, rows * height, columns * width), self.quality)

    def pack(self, codes: npt.NDArray[np.uint16], ranges: npt.NDArray[np.float32]) -> list[bytes]:
        """Tile and encode the codes (B, N) of each sample on their own."""
        image, (rows, columns), (channels, height, width) = self.image, self.grid, self.shape
        tiles = np.zeros((len(codes), rows * columns, height, width), np.uint8)
        tiles[:, :channels] = self._to_grey(codes).reshape(-1, *self.shape)
        grid = tiles.reshape(-1, rows, columns, height, width).swapaxes(2, 3)
        return [image.encode(picture) for picture in torch.from_numpy(grid.reshape(-1, *image.shape))]

    def unpack(self, bodies: Sequence[bytes], ranges: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Decode and cut the codes (B, N) out; :class:`CodecError` if a body is damaged or holds what is no code."""
        image, (rows, columns), (channels, height, width) = self.image, self.grid, self.shape
        pictures = np.zeros((len(bodies), *image.shape), np.uint8)
        for index, body in enumerate(bodies):
            try:
                pictures[index] = image.decode(body).numpy()
            except CodecError as error:
                raise CodecError(f"payload {index}: {error}") from error
        grid = pictures.reshape(-1, rows, height, columns, width).swapaxes(2, 3)
        tiles = grid.reshape(-1, rows * columns, height, width)[:, :channels]
        codes = self._from_grey(tiles.reshape(len(bodies), math.prod(self.shape)))
        if codes.size and codes.max() >= self.levels:
            raise CodecError(f"an image holds the code {codes.max()}, more than {self.bits} bits have: it is damaged")
        return codes

    def _to_grey(self, codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
        return (codes if self.lossless else np.rint(codes * (255 / (self.levels - 1)))).astype(np.uint8)

    def _from_grey(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        return (values if self.lossless else np.rint(values * ((self.levels - 1) / 255))).astype(np.int32)


CODECS[TiledImageCodec.kind] = TiledImageCodec
