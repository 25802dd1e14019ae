import math

import numpy as np
import pytest
import torch
from PIL import Image

from cleave.deployment import ENVELOPE_BYTES, BundleError, CodecError, ImageError, Pipeline

from .deployment_networks import CLASSES, INPUT, SHAPE, images, make_bundle, make_parts

CODES = math.prod(SHAPE)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make_bundle(tmp_path_factory.mktemp(kind) / "bundle", kind)
        return made[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("fixed", [CODES // 2]),
        ("sample", [8 + 40]),
        ("float", [4 * CODES]),
        ("three", [CODES // 2, 8 + 48]),
        ("whole", []),
    ],
)
@pytest.mark.parametrize("count", [1, 6])
def test_run_returns_logits_payloads_and_times(bundles, kind, sizes, count):
    bundle = bundles(kind)
    result = Pipeline(bundle).run(images(count))
    assert result.logits.shape == (count, len(CLASSES))
    assert result.logits.dtype == torch.float32
    assert list(result.payloads) == ["cut", "next"][: len(sizes)]
    assert [len(edge) for edge in result.payloads.values()] == [count] * len(sizes)
    assert [{len(payload) for payload in edge} for edge in result.payloads.values()] == [
        {ENVELOPE_BYTES + size} for size in sizes
    ]
    assert result.payload_bytes == [sum(sizes) + ENVELOPE_BYTES * len(sizes)] * count
    assert tuple(result.part_seconds) == bundle.manifest.route.order
    assert list(result.encode_seconds) == list(result.decode_seconds) == list(result.payloads)
    seconds = (result.part_seconds, result.encode_seconds, result.decode_seconds)
    assert min(1, *(spent for each in seconds for spent in each.values())) >= 0


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 11, 16])
@pytest.mark.parametrize("kind", ["fixed", "sample"])
def test_bits_change_at_run_time(bundles, kind, bits):
    parts, _ = make_parts(kind)
    head, tail = (part.module.eval() for part in parts)
    result = Pipeline(bundles(kind), bits=bits).run(images())
    levels = torch.tensor(2**bits)
    with torch.no_grad():
        expected = tail(*head(images(), levels), levels)
    assert torch.equal(result.logits, expected)
    assert result.payload_bytes == [ENVELOPE_BYTES + CODES * bits // 8 + (8 if kind == "sample" else 0)] * 5


def test_more_bits_come_closer_to_the_unquantised_network(bundles):
    exact = Pipeline(bundles("float")).run(images()).logits
    errors = [
        float((Pipeline(bundles("sample"), bits=b).run(images()).logits - exact).abs().max()) for b in (2, 5, 8, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


def test_bits_change_on_every_edge(bundles):
    assert Pipeline(bundles("three"), bits=3).run(images(1)).payload_bytes == [24 + 8 + 24 + 2 * ENVELOPE_BYTES]


def test_bits_of_the_bundle_may_be_named(bundles):
    expected = Pipeline(bundles("fixed")).run(images())
    found = Pipeline(bundles("fixed"), bits=4).run(images())
    assert found.payloads == expected.payloads
    assert torch.equal(
        Pipeline(bundles("float"), bits=32).run(images()).logits, Pipeline(bundles("float")).run(images()).logits
    )


@pytest.mark.parametrize(
    ("kind", "bits", "message"),
    [
        ("fixed", 1, "bits must be 2 to 16"),
        ("fixed", 17, "bits must be 2 to 16"),
        ("fixed", "4", "bits must be an integer"),
        ("fixed", 32, "bits=32 means float"),
        ("float", 8, "sends float32 without a quantiser"),
        ("float", 17, "bits must be 2 to 16"),
        ("whole", 8, "bits=8: this network is not split"),
    ],
)
def test_bits_that_the_bundle_does_not_have_are_refused(bundles, kind, bits, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(bundles(kind), bits=bits)


@pytest.mark.parametrize("batch", [images().float(), images()[0], images()[..., :4], images()[:, :1]])
def test_images_of_another_kind_are_refused(bundles, batch):
    with pytest.raises(BundleError, match=r"partition head: images must be uint8 \[-1, 3, 8, 8\], got"):
        Pipeline(bundles("fixed")).run(batch)


def test_a_truncated_payload_is_never_decoded(bundles):
    pipeline = Pipeline(bundles("fixed"), envelope=False)
    payload = pipeline.run(images(1)).payloads["cut"][0]
    with pytest.raises(CodecError, match="payload 0 has 31 bytes instead of 32"):
        pipeline.codecs["cut"].decode([payload[:-1]])


def test_files_are_preprocessed_as_the_bundle_says(bundles, tmp_path):
    paths = []
    for i, mode in enumerate(["RGB", "L", "RGBA"]):
        pixels = np.random.default_rng(i).integers(0, 256, (15, 21, 4), np.uint8)
        paths.append(tmp_path / f"{mode}.png")
        Image.fromarray(pixels, "RGBA").convert(mode).save(paths[-1])
    pipeline = Pipeline(bundles("fixed"))
    batch = []
    for path in paths:
        with Image.open(path) as image:
            batch.append(INPUT(image))
        assert torch.equal(pipeline.preprocess(path), batch[-1])
    assert torch.equal(pipeline.run_files(paths).logits, pipeline.run(torch.stack(batch)).logits)


def test_a_file_that_is_no_image_is_named(bundles, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ImageError, match=r"cannot read .*notes\.txt"):
        Pipeline(bundles("fixed")).run_files([tmp_path / "notes.txt"])
    with pytest.raises(ValueError, match="paths is empty"):
        Pipeline(bundles("fixed")).run_files([])
