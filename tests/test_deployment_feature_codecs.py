import dataclasses
import io
import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import zstandard
from PIL import Image

from cleave.deployment import (
    CODINGS,
    CodecError,
    FloatCodec,
    ParityError,
    Pipeline,
    SparseCodec,
    UniformCodec,
    ZstdCodec,
    code_codec,
    codec_from_dict,
    export_bundle,
    load_bundle,
)
from cleave.deployment.codecs.image_codecs import JPEGCodec
from cleave.deployment.codecs.tiled_image import TiledImageCodec

from .deployment_networks import CLASSES, INPUT, OUTPUTS, SHAPE, codecs_of, edge, images, make_bundle, make_parts

LOSSY = ["tiled_jpeg", "tiled_jpeg_zstd", "tiled_webp@50"]
WAYS = [*(c for c in CODINGS if "jpeg" not in c), *LOSSY]


def build(way, shape=(5, 4, 6), bits=4, low=None, high=None):
    """A codec by its coding; ``@50`` behind it is its quality."""
    coding, _, quality = way.partition("@")
    quality = int(quality) if quality else 80 if "jpeg" in coding else None
    return code_codec(coding, shape, bits, low, high, quality)


def sent(shape=(5, 4, 6), bits=4, batch=3, zeros=0.0, seed=0):
    """Codes of which a share is 0, with ranges that begin at zero."""
    generator = torch.Generator().manual_seed(seed + bits)
    codes = torch.randint(0, 2**bits, (batch, *shape), generator=generator, dtype=torch.int32)
    codes[torch.rand(codes.shape, generator=generator) < zeros] = 0
    return {"codes": codes, "low": torch.zeros(batch), "high": torch.tensor([1.5, 0.1, 7.0])[:batch]}


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("way", WAYS)
def test_codes_arrive(way, bits, fixed):
    codec = build(way, (5, 4, 6), bits, *((0.0, 1.5) if fixed else ()))
    tensors = sent(bits=bits, zeros=0.7)
    if fixed:
        tensors["high"] = torch.full((3,), 1.5)
    received = codec.decode(codec.encode(tensors))
    assert tuple(received) == codec.delivers == ("codes", "low", "high", "levels")
    assert codec.sends == ("codes", "low", "high")
    assert received["levels"] == codec.levels == 2**bits
    assert received["codes"].dtype == torch.int32
    assert received["codes"].shape == tensors["codes"].shape
    assert received["codes"].min() >= 0
    assert received["codes"].max() < 2**bits
    assert codec.lossless == (way not in LOSSY)
    for name in tensors if codec.lossless else ("low", "high"):
        assert torch.equal(received[name], tensors[name])


@pytest.mark.parametrize("way", WAYS)
def test_a_samples_payload_does_not_depend_on_its_neighbours(way):
    codec, tensors = build(way), sent(zeros=0.5)
    together = codec.encode(tensors)
    assert [codec.encode({k: v[i : i + 1] for k, v in tensors.items()})[0] for i in range(3)] == together
    assert all(torch.equal(codec.decode(together)[k][1:2], codec.decode(together[1:2])[k]) for k in tensors)


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_has_no_payloads(way):
    received = build(way).decode([])
    assert received["codes"].shape == (0, 5, 4, 6)
    assert build(way).encode(received) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fixed", [(), (-0.1, 0.3)])
def test_codecs_round_trip_through_json_and_change_their_width(way, fixed):
    codec = build(way, (5, 4, 6), 4, *fixed)
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict()))) == codec
    wider = codec.with_bits(7)
    assert (wider.bits, wider.levels, wider.settings["levels"], wider.shape) == (7, 128, 128, (5, 4, 6))
    assert wider.with_bits(4) == codec
    assert type(wider) is type(codec)


def by_hand(codes, bits, zero):
    """Zero-value compression, digit by digit."""
    digits = [format(code, f"0{bits}b") for code in codes]
    dense = "0" + "".join(digits)
    sparse = "1" + "".join("01"[code != zero] for code in codes)
    sparse += "".join(d for d, code in zip(digits, codes, strict=True) if code != zero)
    shorter = sparse if len(sparse) < len(dense) else dense
    shorter += "0" * (-len(shorter) % 8)
    return bytes(int(shorter[i : i + 8], 2) for i in range(0, len(shorter), 8))


@pytest.mark.parametrize("bits", [2, 3, 8, 11, 16])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4, 5)])
def test_sparse_codes_are_a_map_and_the_codes_that_are_not_zeros(shape, zeros, bits):
    codec, tensors = SparseCodec(shape, bits), sent(shape, bits, zeros=zeros)
    payloads = codec.encode(tensors)
    for payload, codes, high in zip(payloads, tensors["codes"], tensors["high"], strict=True):
        assert payload == struct.pack("<ff", 0.0, high) + by_hand(codes.flatten().tolist(), bits, 0)
        assert len(payload) <= 8 + math.prod(shape) * bits // 8 + 1
    assert torch.equal(codec.decode(payloads)["codes"], tensors["codes"])


@pytest.mark.parametrize(
    ("low", "high", "zero"),
    [(0.0, 1.5, 0), (-1.0, 2.0, 5), (-3.0, 0.0, 15), (-1.0, 1.0, 8), (0.5, 1.0, 0), (-2.0, -1.0, 15)],
)
def test_zeros_code_is_that_of_the_range(low, high, zero):
    codes = torch.full((1, 40), zero, dtype=torch.int32)
    codes[0, 3] = 1
    tensors = {"codes": codes, "low": torch.full((1,), low), "high": torch.full((1,), high)}
    for codec in (SparseCodec((40,), 4, low, high), SparseCodec((40,), 4)):
        (payload,) = codec.encode(tensors)
        head = b"" if codec.low is not None else struct.pack("<ff", low, high)
        assert payload == head + by_hand(codes[0].tolist(), 4, zero)
        assert len(payload) - len(head) == 6
        assert torch.equal(codec.decode([payload])["codes"], codes)


def test_a_range_without_width_has_zero_at_code_zero():
    codec = SparseCodec((40,), 4)
    tensors = {"codes": torch.zeros(1, 40).int(), "low": torch.full((1,), 3.0), "high": torch.full((1,), 3.0)}
    assert torch.equal(codec.decode(codec.encode(tensors))["codes"], tensors["codes"])


def test_every_damage_to_sparse_codes_is_found_or_gives_other_codes_of_the_same_spelling():
    codec = SparseCodec((3, 4), 5, 0.0, 1.0)
    for zeros in (0.0, 0.8):
        tensors = sent((3, 4), 5, batch=1, zeros=zeros) | {"high": torch.ones(1)}
        (payload,) = codec.encode(tensors)
        for damaged in (*(payload[:n] for n in range(len(payload))), payload + b"\0", payload * 3):
            with pytest.raises(CodecError, match=rf"payload 0 of {len(damaged)} bytes is cut short or damaged"):
                codec.decode([damaged])
        for bit in range(8 * len(payload)):
            altered = bytearray(payload)
            altered[bit // 8] ^= 128 >> bit % 8
            try:
                received = codec.decode([bytes(altered)])
            except CodecError:
                continue
            assert codec.encode(received) == [bytes(altered)]
            assert not torch.equal(received["codes"], tensors["codes"])


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ([0b1_0010000, 0b0_0011_000], None),
        ([0b1_0010000, 0b0_0011_001], "padding that is not zero"),
        ([0b1_0010000, 0b0_0000_000], "a zero sent as another code"),
        ([0b1_1111111, 0b1_0011_001, 0b1001_1001, 0b1001_1001, 0b1001_1001, 0b10000000], "a needless map"),
        ([0b0_0000_000, 0, 0, 0, 0], "no map where it is shorter"),
    ],
)
def test_a_body_has_one_spelling(body, what):
    codec = SparseCodec((8,), 4, 0.0, 1.0)
    if what is None:
        assert codec.decode([bytes(body)])["codes"].tolist() == [[0, 0, 3, 0, 0, 0, 0, 0]]
    else:
        with pytest.raises(CodecError, match="damaged"):
            codec.decode([bytes(body)])


def test_a_payload_without_its_whole_range_is_refused():
    with pytest.raises(CodecError, match="payload 1 has 7 bytes, its range alone 8: cut short"):
        SparseCodec((3,), 4).decode([*SparseCodec((3,), 4).encode(sent((3,), batch=1)), bytes(7)])


@pytest.mark.parametrize(
    ("channels", "grid"),
    [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (8, (2, 4)), (16, (4, 4)), (48, (6, 8)), (512, (16, 32))],
)
def test_the_grid_is_that_of_choi_and_bajic(channels, grid):
    codec = TiledImageCodec((channels, 2, 3), 8)
    assert codec.grid == grid
    assert codec.image.shape == (1, grid[0] * 2, grid[1] * 3)
    if math.log2(channels).is_integer():
        assert grid == (2 ** math.floor(math.log2(channels) / 2), 2 ** math.ceil(math.log2(channels) / 2))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_the_tiles_stand_side_by_side_in_reading_order(format, bits):  # noqa: A002
    quality = 90 if format == "jpeg" else None
    codec = TiledImageCodec((6, 3, 5), bits, 0.0, 1.5, format=format, quality=quality)
    tensors = sent((6, 3, 5), bits, batch=1) | {"high": torch.full((1,), 1.5)}
    (payload,) = codec.encode(tensors)
    picture = np.array(Image.open(io.BytesIO(codec.image.file(payload))).convert("L"))
    expected = np.zeros((2 * 3, 4 * 5))
    for channel in range(6):
        row, column = divmod(channel, 4)
        expected[3 * row : 3 * row + 3, 5 * column : 5 * column + 5] = tensors["codes"][0, channel]
    if quality is None:
        assert np.array_equal(picture, expected)
        return
    # A lossy format sees the codes over the whole range of grey, and what it leaves is rounded to the nearest code.
    assert np.abs(picture - expected * 255 / (2**bits - 1)).mean() < 12
    nearest = [round(int(grey) * (2**bits - 1) / 255) for grey in picture[3:, 5:10].ravel()]
    assert codec.decode([payload])["codes"][0, 5].flatten().tolist() == nearest


@pytest.mark.parametrize("way", ["tiled_jpeg", "tiled_webp@95"])
def test_smooth_maps_survive_a_lossy_image_better_at_a_higher_quality(way):
    rows = torch.linspace(0, 3, 8)
    codes = (7.5 + 7 * torch.sin(rows[:, None] + rows[None] + torch.arange(4.0).view(4, 1, 1))).int()[None]
    tensors = {"codes": codes, "low": torch.zeros(1), "high": torch.ones(1)}
    errors, sizes = [], []
    for quality in (5, 95):
        codec = TiledImageCodec(
            (4, 8, 8), 4, 0.0, 1.0, format=way.split("@")[0].removeprefix("tiled_"), quality=quality
        )
        payloads = codec.encode(tensors)
        errors.append((codec.decode(payloads)["codes"] - codes).abs().float().mean())
        sizes.append(len(payloads[0]))
    assert errors[1] < 0.2 < errors[0]
    assert sizes[1] > sizes[0]


def test_a_jpeg_of_tiles_has_no_headers():
    codec, tensors = build("tiled_jpeg", low=0.0, high=1.5), sent() | {"high": torch.full((3,), 1.5)}
    image = codec.image
    assert image == JPEGCodec((1, 8, 24), 80)
    assert [image.file(p) for p in codec.encode(tensors)] == [
        image.header + p + b"\xff\xd9" for p in codec.encode(tensors)
    ]


@pytest.mark.parametrize("way", ["tiled_png", "tiled_webp", "tiled_jpeg"])
def test_a_damaged_image_is_refused_and_named(way):
    codec = build(way)
    payloads = codec.encode(sent())
    payloads[1] = payloads[1][:-1]
    with pytest.raises(CodecError, match="payload 1: .*damaged"):
        codec.decode(payloads)


def test_an_image_that_holds_no_codes_is_refused():
    coarse, fine = (TiledImageCodec((1, 2, 2), bits, 0.0, 1.0) for bits in (4, 8))
    payloads = fine.encode({"codes": torch.full((1, 1, 2, 2), 16), "low": torch.zeros(1), "high": torch.ones(1)})
    with pytest.raises(CodecError, match="holds the code 16, more than 4 bits have"):
        coarse.decode(payloads)


@pytest.mark.parametrize("inner", [UniformCodec((500,), 8), SparseCodec((500,), 4, 0.0, 1.5), FloatCodec((500,))])
def test_zstd_is_a_frame_of_the_inner_payload_without_magic_number(inner):
    codec = ZstdCodec(inner, level=3)
    tensors = sent((500,), 4, batch=1, zeros=0.9) | {"z": torch.arange(500.0)[None]}
    (payload,), (plain,) = codec.encode(tensors), inner.encode(tensors)
    magic = b"\x28\xb5\x2f\xfd"
    assert zstandard.decompress(magic + payload) == plain
    assert magic + payload == zstandard.compress(plain, 3)
    received, expected = codec.decode([payload]), inner.decode([plain])
    assert received.keys() == expected.keys() == set(codec.delivers)
    assert all(torch.equal(received[name], expected[name]) for name in expected)
    assert (codec.sends, codec.shape, codec.bits, codec.levels) == (inner.sends, (500,), inner.bits, inner.levels)
    assert codec.settings == inner.settings


def test_damaged_zstd_payloads_are_refused():
    codec = build("packed_zstd", low=0.0, high=1.5)
    (payload,) = codec.encode(sent(batch=1, zeros=0.9))
    for damaged in (*(payload[:n] for n in range(len(payload))), payload + b"\0", payload * 2):
        with pytest.raises(CodecError, match="payload 0 .* is not one whole zstd frame"):
            codec.decode([damaged])


@pytest.mark.parametrize("size", [True, False])
def test_a_frame_that_would_unfold_without_end_is_refused(size):
    parameters = zstandard.ZstdCompressionParameters(format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=size)
    bomb = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(10**7))
    assert len(bomb) < 1000
    with pytest.raises(CodecError, match=r"payload 0 claims \d+ bytes, more than 6016"):
        build("packed_zstd").decode([bomb])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: code_codec("sparce", (3,), 4),
            "coding must be one of packed, sparse, tiled_png, .* Did you mean 'spar",
        ),
        (lambda: code_codec("huffman", (3,), 4), r"got 'huffman'\.$"),
        (lambda: code_codec("tiled_png", (3,), 4), r"only a map \(C, H, W\) can be tiled .* got codes of shape \(3,\)"),
        (lambda: code_codec("tiled_webp_zstd", (3, 4), 4), r"only a map \(C, H, W\)"),
        (lambda: code_codec("tiled_png", (3, 2, 2), 9), "bits must be 2 to 8 for codes sent as an image, got 9"),
        (lambda: code_codec("tiled_png", (3, 2, 2), 4).with_bits(16), "bits must be 2 to 8"),
        (lambda: code_codec("tiled_png", (3, 2, 2), 32), "bits=32 means float"),
        (lambda: code_codec("tiled_jpeg", (3, 2, 2), 4), "no lossless form: give a quality"),
        (lambda: code_codec("tiled_png", (3, 2, 2), 4, quality=5), "quality=5 has no meaning"),
        (lambda: code_codec("sparse", (3,), 4, quality=5), "quality=5 has no meaning for coding='sparse'"),
        (lambda: code_codec("packed_zstd", (3,), 4, quality=5), "quality=5 has no meaning"),
        (lambda: code_codec("sparse", (3,), 4, low=1.0, high=0.0), "low must be below high"),
        (lambda: code_codec("sparse", (3,), 4, low=0.0), "go together"),
        (lambda: code_codec("tiled_png", (4096, 1024, 1024), 4), "more than|sides of"),
        (lambda: TiledImageCodec((3, 2, 2), 4, format="gif"), "format must be one of"),
        (lambda: ZstdCodec(ZstdCodec(FloatCodec((3,)))), "inner must be another codec than zstd"),
        (lambda: ZstdCodec(3), "inner must be a codec, got 3"),
        (lambda: ZstdCodec(FloatCodec((3,)), level=0), "level must be a whole number, 1 to 22, got 0"),
        (lambda: ZstdCodec(FloatCodec((3,)), level=True), "level must be a whole number"),
        (lambda: codec_from_dict({"kind": "zstd", "inner": {"kind": "zstd"}, "level": 1}), "another codec than zstd"),
        (lambda: codec_from_dict({"kind": "zstd", "inner": {"kind": "float32"}, "level": 1}), "takes the keys"),
        (lambda: codec_from_dict({"kind": "sparse", "shape": [3], "bits": 4}), "takes the keys"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(call, message):
    with pytest.raises(CodecError, match=message):
        call()


def export_with(folder, parts, codec):
    edges = [edge("head", "tail", cut=codec)]
    return export_bundle(folder, parts, edges, input=INPUT, outputs=OUTPUTS, images=images())


@pytest.mark.parametrize("kind", ["fixed", "sample"])
@pytest.mark.parametrize("way", WAYS)
def test_a_bundle_passes_the_gate_and_runs(way, kind, tmp_path):
    parts, edges = make_parts(kind)
    (codec,) = codecs_of(edges)
    codec = build(way, codec.shape, codec.bits, codec.low, codec.high)
    bundle = export_with(tmp_path / "b", parts, codec)
    assert load_bundle(tmp_path / "b").manifest.route.codecs == {"cut": codec}
    bundle.self_test()
    result = Pipeline(bundle).run(images(seed=3))
    assert [len(p) for p in result.payloads["cut"]] == result.payload_bytes
    plain = Pipeline(make_bundle(tmp_path / "plain", kind)).run(images(seed=3))
    if codec.lossless:
        assert torch.equal(result.logits, plain.logits)
    else:
        assert result.logits.shape == plain.logits.shape
        assert not torch.equal(result.logits, plain.logits)
        # What arrived is the server's input, and may differ from what the device was expected to send.
        arrived, sent = (bundle.samples[place]["cut.codes"] for place in ("server", "device"))
        assert arrived.shape == sent.shape
    assert Pipeline(bundle, bits=2).run(images(2)).logits.shape == (2, len(CLASSES))


def test_float_payloads_can_be_compressed_in_a_bundle(tmp_path):
    parts, edges = make_parts("float")
    bundle = export_with(tmp_path / "b", parts, ZstdCodec(*codecs_of(edges)))
    plain = Pipeline(make_bundle(tmp_path / "plain", "float")).run(images(seed=3))
    assert torch.equal(Pipeline(bundle).run(images(seed=3)).logits, plain.logits)


@dataclasses.dataclass(frozen=True)
class Shifting(UniformCodec):
    """Delivers something else than it was sent, while it says that it does not, or does."""

    says: bool = True
    wrong: str = "codes"

    @property
    def lossless(self):
        return self.says

    def decode(self, payloads):
        received = super().decode(payloads)
        return received | {self.wrong: received[self.wrong] * 0 + 1}


@pytest.mark.parametrize(("says", "wrong"), [(True, "codes"), (True, "low"), (False, "low")])
def test_the_gate_refuses_a_codec_that_loses_more_than_it_says(says, wrong, tmp_path):
    parts, _ = make_parts("fixed")
    codec = Shifting(SHAPE, 4, -1.0, 1.0, says=says, wrong=wrong)
    with pytest.raises(ParityError, match=f"the bytes of .*: {wrong} differs"):
        export_with(tmp_path / "b", parts, codec)


def test_image_codecs_are_loaded_only_for_tiled_codes():
    """A device that sends packed codes loads no baseline."""
    script = """
import sys
import cleave.deployment as deployment
found = lambda: [name for name in sys.modules if name.endswith(("image_codecs", "jpeg_scan", "tiled_image"))]
plain = deployment.code_codec("sparse_zstd", (3, 2, 2), 4)
assert deployment.codec_from_dict(plain.to_dict()) == plain
assert not found(), found()
tiled = {"kind": "tiled_image", "shape": [3, 2, 2], "bits": 4, "low": None, "high": None, "format": "png",
         "quality": None}
assert deployment.codec_from_dict(tiled) == deployment.code_codec("tiled_png", (3, 2, 2), 4)
assert found()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
