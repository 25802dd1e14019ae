import binascii
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cleave.deployment import CodecError
from cleave.deployment.codecs.image_codecs import JPEGCodec, PNGCodec, WebPCodec, image_codec
from cleave.deployment.codecs.jpeg_scan import check_scan

# ITU-T T.81, Annex K: tables K.1 and K.2, row by row, and the code counts and values of table K.3.
LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMINANCE = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
DC_LUMINANCE = bytes([0, 0, 1, 5, 1, 1, 1, 1, 1, 1, *[0] * 7, *range(12)])

SHAPES = [(3, 32, 32), (1, 32, 32), (3, 17, 9), (1, 5, 40), (3, 1, 1), (1, 1, 1)]
LOSSY = [JPEGCodec, WebPCodec]
LOSSLESS = [WebPCodec, PNGCodec]


def smooth(shape, seed=0):
    """A picture with edges and gradients, as photographs have, and some noise."""
    generator = np.random.default_rng(seed)
    _, height, width = shape
    rows, columns = np.mgrid[:height, :width]
    picture = 120 + 60 * np.sin(rows / 5 + seed) + 50 * (columns > width // 2) + generator.normal(0, 8, shape)
    return torch.from_numpy(np.clip(picture, 0, 255).astype(np.uint8))


def noise(shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pillow(image):
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def saved(image, format, **options):  # noqa: A002
    buffer = io.BytesIO()
    pillow(image).save(buffer, format, **options)
    return buffer.getvalue()


def opened(file, mode):
    pixels = np.array(Image.open(io.BytesIO(file)).convert(mode))
    return torch.from_numpy(pixels[None] if mode == "L" else pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("picture", [smooth, noise])
def test_a_lossless_picture_arrives_as_it_was_sent(codec, shape, picture):
    codec, image = codec(shape), picture(shape)
    assert codec.lossless
    assert torch.equal(codec.decode(codec.encode(image)), image)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quality", [1, 10, 50, 75, 100])
@pytest.mark.parametrize("codec", LOSSY)
def test_a_lossy_picture_arrives_as_pillow_would_have_it(codec, quality, shape):
    codec, image = codec(shape, quality), smooth(shape, quality)
    assert not codec.lossless
    options = {"method": 6} if codec.format == "WEBP" else {"subsampling": "4:2:0" if shape[0] == 3 else "4:4:4"}
    file = saved(image, codec.format, quality=quality, **options)
    payload = codec.encode(image)
    assert codec.file(payload) == file
    assert torch.equal(codec.decode(payload), opened(file, "RGB" if shape[0] == 3 else "L"))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("picture", [smooth, noise, lambda shape, seed: torch.full(shape, 255 * (seed % 2)).byte()])
@pytest.mark.parametrize("shape", [(3, 33, 47), (3, 16, 16), (1, 9, 31)])
def test_every_scan_that_libjpeg_writes_is_found_whole(shape, picture, subsampling):
    for quality in (1, 30, 75, 95, 100):
        codec = JPEGCodec(shape, quality, subsampling)
        image = picture(shape, seed=quality)
        payload = codec.encode(image)
        decoded = codec.decode(payload)
        options = {"subsampling": subsampling if shape[0] == 3 else "4:4:4"}
        file = saved(image, "JPEG", quality=quality, **options)
        assert torch.equal(decoded, opened(file, "RGB" if shape[0] == 3 else "L"))


def test_the_header_of_a_jpeg_is_the_standards_own_and_no_part_of_the_payload():
    codec = JPEGCodec((3, 32, 32), 50)
    payloads = [codec.encode(smooth((3, 32, 32), seed)) for seed in range(5)]
    assert len(codec.header) == 623
    assert {codec.file(p).removesuffix(p + b"\xff\xd9") for p in payloads} == {codec.header}
    assert len(set(payloads)) == 5
    for quality, scale in ((50, 100), (10, 500), (75, 50), (100, 0)):
        file = JPEGCodec((3, 32, 32), quality).file(JPEGCodec((3, 32, 32), quality).encode(smooth((3, 32, 32))))
        for number, table in enumerate((LUMINANCE, CHROMINANCE)):
            scaled = [min(max((int(entry) * scale + 50) // 100, 1), 255) for entry in table.split()]
            assert Image.open(io.BytesIO(file)).quantization[number] == scaled
    assert b"\xff\xc4" + struct.pack(">H", 2 + len(DC_LUMINANCE)) + DC_LUMINANCE in codec.header


def test_what_is_stripped_is_what_follows_from_the_codec():
    image = smooth((3, 32, 32))
    stripped = {
        JPEGCodec((3, 32, 32), 50): 623 + 2,
        JPEGCodec((1, 32, 32), 50): 623 - 6 - 4 - 69 - 33 - 183 + 2,  # no chrominance: components, its three tables
        PNGCodec((3, 32, 32)): 57,
    }
    for codec, bytes_ in stripped.items():
        payload = codec.encode(image[: codec.shape[0]])
        assert len(codec.file(payload)) - len(payload) == bytes_
    for codec, constant in ((WebPCodec((3, 32, 32), 50), 7), (WebPCodec((3, 32, 32)), 5)):
        payload = codec.encode(image)
        stream = len(payload) - 2 + constant
        assert len(codec.file(payload)) == 20 + stream + stream % 2  # RIFF and chunk headers, padded to even


def test_a_png_of_several_chunks_is_one_stream():
    image = noise((3, 300, 300))
    codec = PNGCodec((3, 300, 300))
    assert saved(image, "PNG", optimize=True).count(b"IDAT") > 1
    assert torch.equal(codec.decode(codec.encode(image)), image)


@pytest.mark.parametrize("quality", [1, 50, 95])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 17, 9)])
def test_a_jpeg_payload_cut_short_or_continued_is_refused(shape, quality):
    codec = JPEGCodec(shape, quality)
    payload = codec.encode(smooth(shape))
    for damaged in (*(payload[:n] for n in range(len(payload))), payload + b"\0", payload + b"\xff\xd9", payload * 2):
        with pytest.raises(CodecError, match="JPEG scan"):
            codec.decode(damaged)


def test_padding_of_a_jpeg_scan_that_is_not_ones_is_refused():
    codec = JPEGCodec((1, 8, 8), 50)
    payload = codec.encode(torch.full((1, 8, 8), 128, dtype=torch.uint8))  # DC difference 0 and end of block: 00 1010
    assert payload == bytes([0b00101011])
    with pytest.raises(CodecError, match="last block"):
        codec.decode(bytes([0b00101010]))


def test_a_run_of_zeros_beyond_the_block_is_refused():
    codec = JPEGCodec((1, 8, 8), 50)
    digits = "00" + "11111111001" * 5  # DC difference 0, then five runs of sixteen zeros
    digits += "1" * (-len(digits) % 8)
    scan = int(digits, 2).to_bytes(len(digits) // 8, "big").replace(b"\xff", b"\xff\x00")
    with pytest.raises(CodecError, match="last block"):
        check_scan(scan, codec.header)


@pytest.mark.parametrize("codec", [WebPCodec((3, 9, 7)), WebPCodec((3, 9, 7), 30), PNGCodec((3, 9, 7))])
def test_a_payload_with_a_checksum_that_changed_anywhere_is_refused(codec):
    payload = codec.encode(smooth((3, 9, 7)))
    whole = codec.decode(payload)
    unseen = 0
    for place in range(len(payload)):
        altered = bytearray(payload)
        altered[place] ^= 1 << place % 8
        try:
            assert torch.equal(codec.decode(bytes(altered)), whole)  # a bit that deflate does not use
            unseen += 1
        except CodecError:
            pass
    assert unseen <= (1 if codec.format == "PNG" else 0)
    for damaged in (*(payload[:n] for n in range(len(payload))), payload + b"\0", payload * 2):
        with pytest.raises(CodecError, match="damaged"):
            codec.decode(damaged)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 16)])
@pytest.mark.parametrize("codec", [JPEGCodec, WebPCodec])
def test_whatever_arrives_is_a_picture_or_a_codec_error(codec, shape):
    codec = codec(shape, 40)
    generator = np.random.default_rng(0)
    payload = codec.encode(smooth(shape))
    refused = 0
    for _ in range(300):
        altered = bytearray(payload)
        for place in generator.integers(len(payload), size=3):
            altered[place] = generator.integers(256)
        if codec.format == "WEBP":  # so that libwebp itself sees the damage
            altered[-2:] = struct.pack(">H", binascii.crc_hqx(altered[:-2], 0xFFFF) ^ 0xFFFF)
        try:
            decoded = codec.decode(bytes(altered))
        except CodecError:
            refused += 1
        else:
            assert (decoded.shape, decoded.dtype) == (shape, torch.uint8)
    assert refused > 0
    with pytest.raises(CodecError):
        codec.decode(b"")


def test_a_payload_that_would_unfold_without_end_is_refused():
    with pytest.raises(CodecError, match="cut short or damaged"):
        PNGCodec((1, 8, 8)).decode(zlib.compress(bytes(10**6)))
    for codec in (PNGCodec((1, 8, 8)), JPEGCodec((1, 8, 8), 50), WebPCodec((1, 8, 8), 50)):
        with pytest.raises(CodecError, match="is longer than"):
            codec.decode(bytes(10**6))


@pytest.mark.parametrize("format", ["jpeg", "webp", "png"])
@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 1, 1)])
def test_no_codec_needs_more_than_what_it_may_take(format, shape):  # noqa: A002
    for picture in (noise(shape), noise(shape) // 128 * 255):
        codec = image_codec(format, shape, 100 if format == "jpeg" else None)
        assert codec.decode(codec.encode(picture)).shape == shape


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"uint8 \(3, 8, 8\), got torch.float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"got torch.uint8 \(8, 8, 3\)"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"got torch.uint8 \(1, 8, 8\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(image, message):
    with pytest.raises(CodecError, match=message):
        PNGCodec((3, 8, 8)).encode(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "wepb"}, "one of jpeg, webp, png, got 'wepb'. Did you mean 'webp'"),
        ({"format": "avif"}, "one of jpeg, webp, png, got 'avif'.$"),
        ({"format": "jpeg"}, "JPEG has no lossless form: give a quality, 1 to 100"),
        ({"format": "png", "quality": 50}, "PNG is lossless: quality=50 has no meaning"),
        ({"format": "jpeg", "quality": 0}, "quality must be a whole number, 1 to 100, got 0"),
        ({"format": "webp", "quality": 101}, "quality must be .* got 101"),
        ({"format": "webp", "quality": 7.5}, "quality must be .* got 7.5"),
        ({"format": "webp", "quality": True}, "quality must be .* got True"),
        ({"shape": (8, 8)}, r"shape must be \(1 or 3, H, W\)"),
        ({"shape": (2, 8, 8)}, r"shape must be \(1 or 3, H, W\)"),
        ({"shape": (3, 0, 8)}, r"shape must be \(1 or 3, H, W\)"),
        ({"shape": (3, 16384, 8)}, "sides of 1 to 16383"),
        ({"shape": (3, 16000, 16000)}, "more than 89478485 pixels"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(CodecError, match=message):
        image_codec(**({"format": "webp", "shape": (3, 8, 8)} | arguments))


def test_an_unknown_subsampling_is_refused():
    with pytest.raises(CodecError, match="subsampling must be one of 4:4:4, 4:2:2, 4:2:0, got '4:1:1'"):
        JPEGCodec((3, 8, 8), 50, "4:1:1")


@pytest.mark.parametrize("codec", [JPEGCodec((3, 8, 8), 50), WebPCodec((3, 8, 8), 50), PNGCodec((3, 8, 8))])
def test_a_file_with_other_headers_than_expected_is_refused(codec, monkeypatch):
    def save(picture, buffer, format, **options):  # noqa: A002
        other = {"JPEG": {"optimize": True}, "WEBP": {"xmp": b"about it"}, "PNG": {"dpi": (300, 300)}}[format]
        original(picture, buffer, format, **options | other)

    codec.encode(smooth((3, 8, 8)))  # an encoder keeps the header it made
    original = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(CodecError, match="wrote a .* file whose headers are not constant"):
        codec.encode(smooth((3, 8, 8)))
