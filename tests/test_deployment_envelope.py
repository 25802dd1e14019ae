"""What stands in front of a payload says whose it is; without it nobody would notice that it is another's."""

import hashlib
import json
import re
import zlib

import pytest
import torch

from cleave.deployment import (
    ENVELOPE_BYTES,
    BundleError,
    CodecError,
    EntropyCodec,
    Envelope,
    FloatCodec,
    Message,
    Pipeline,
    Side,
    UniformCodec,
    ZstdCodec,
    build_policy,
    code_codec,
    export_bundle,
    load_bundle,
    read_manifest,
)
from cleave.deployment.bundle.canonical_json import canonical, digest, dump

from .deployment_networks import INPUT, OUTPUTS, SHAPE, edge, exit_bundle, exit_images, images, make_bundle, make_parts

DIGEST = hashlib.sha256(b"bundle").hexdigest()
CODECS = {
    "uniform": UniformCodec(SHAPE, 4, -1, 1),
    "per sample": UniformCodec(SHAPE, 4),
    "sparse": code_codec("sparse", SHAPE, 4),
    "png": code_codec("tiled_png", SHAPE, 4),
    "webp": code_codec("tiled_webp", SHAPE, 4),
    "jpeg": code_codec("tiled_jpeg", SHAPE, 4, quality=60),
    "zstd": ZstdCodec(UniformCodec(SHAPE, 4)),
    "float": FloatCodec(SHAPE),
    "entropy": EntropyCodec(SHAPE, (0,) * 4, ((4096,) * 16,) * 4),
}


def payload_of(codec):
    codes = torch.arange(64, dtype=torch.int32).view(1, *SHAPE) % 16
    known = {"codes": codes, "low": torch.tensor([-1.0]), "high": torch.tensor([1.0]), "z": codes.float()}
    return codec.encode({name: known[name] for name in codec.sends})[0]


# --- the envelope, as docs/bundle.md describes it -----------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_it_is_that_of_the_document(name):
    codec = CODECS[name]
    payload = payload_of(codec)
    bits = {"float": 32, "entropy": 0}.get(name, 4)
    # Of this codec's values only whole floats are spelled otherwise by RFC 8785 than by Python: without a point.
    spelled = json.dumps({"codec": codec.to_dict(), "target": "server", "tensor": "layer2"}, sort_keys=True)
    edge_digest = hashlib.sha256(re.sub(r"(\d)\.0\b", r"\1", spelled).replace(" ", "").encode()).digest()
    head = bytes([1, bits]) + bytes.fromhex(DIGEST)[:3] + edge_digest[:3]
    sealed = Envelope(DIGEST, "layer2", "server", codec).seal(payload)
    assert sealed == head + zlib.crc32(head + payload).to_bytes(4, "big") + payload
    assert len(sealed) == ENVELOPE_BYTES + len(payload)


def test_the_example_of_the_document():
    codec = UniformCodec((3,), 4, 0.0, 1.5)
    envelope = Envelope("0123456789abcdef" * 4, "layer2", "server", codec)
    assert envelope.seal(bytes.fromhex("12f0")).hex() == "010401234554718b0af7325812f0"
    codec = EntropyCodec((2, 4), (-1, 0), ((16384, 32768, 16384), (65000, 536)))
    (payload,) = codec.encode({"codes": torch.tensor([[[-1, 0, 1, 0], [0, 0, 1, 0]]])})
    assert payload.hex() == "2de845ae8afb"


# --- what is another's is refused ---------------------------------------------------------------------------------


OTHERS = {
    "bundle": (lambda e: Envelope("ff" * 32, e.tensor, e.target, e.codec), "was made with another bundle"),
    "tensor": (lambda e: Envelope(e.bundle, "layer3", e.target, e.codec), "was made for another edge"),
    "placement": (lambda e: Envelope(e.bundle, e.tensor, "edge", e.codec), "was made for another edge"),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("other", OTHERS)
def test_a_payload_of_another_bundle_tensor_or_placement_is_refused(name, other):
    change, message = OTHERS[other]
    envelope = Envelope(DIGEST, "layer2", "server", CODECS[name])
    sealed = envelope.seal(payload_of(CODECS[name]))
    assert envelope.opened(sealed) == payload_of(CODECS[name])
    with pytest.raises(CodecError, match=f"payload 7 {message}"):
        change(envelope).opened(sealed, 7)


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.levels])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_payload_of_another_width_is_refused(name, bits):
    codec = CODECS[name]
    sealed = Envelope(DIGEST, "layer2", "server", codec).seal(payload_of(codec))
    with pytest.raises(CodecError, match=f"was made at 4 bits, this side reads {bits} bits; give both sides the same"):
        Envelope(DIGEST, "layer2", "server", codec.with_bits(bits)).opened(sealed)


def test_a_payload_of_another_codec_is_refused():
    envelopes = {name: Envelope(DIGEST, "layer2", "server", codec) for name, codec in CODECS.items()}
    sealed = {name: envelope.seal(b"payload") for name, envelope in envelopes.items()}
    for name, envelope in envelopes.items():
        for other in CODECS:
            if other != name:
                with pytest.raises(CodecError, match="was made"):
                    envelope.opened(sealed[other])


@pytest.mark.parametrize("payload", [b"", b"\0", b"payload" * 9])
def test_every_altered_or_missing_byte_is_found(payload):
    envelope = Envelope(DIGEST, "layer2", "server", CODECS["float"])
    sealed = envelope.seal(payload)
    for length in range(len(sealed)):
        with pytest.raises(CodecError, match="cut short|damaged"):
            envelope.opened(sealed[:length])
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1 << place % 8
        with pytest.raises(CodecError, match="damaged"):
            envelope.opened(bytes(changed))
    with pytest.raises(CodecError, match="damaged"):
        envelope.opened(sealed + b"\0")


@pytest.mark.parametrize("sealed", [None, "text", 3, [1, 2], torch.zeros(20)])
def test_what_is_no_bytes_is_refused(sealed):
    with pytest.raises(CodecError, match="payload 2 must be bytes, got"):
        Envelope(DIGEST, "layer2", "server", CODECS["float"]).opened(sealed, 2)


def test_any_kind_of_bytes_is_read():
    envelope = Envelope(DIGEST, "layer2", "server", CODECS["float"])
    sealed = envelope.seal(b"payload")
    for kind in (bytearray, memoryview):
        assert envelope.opened(kind(sealed)) == b"payload"


def test_another_version_is_named():
    envelope = Envelope(DIGEST, "layer2", "server", CODECS["float"])
    head = b"\x02" + envelope.head[1:]
    with pytest.raises(CodecError, match="envelope of version 2, this reader knows 1"):
        envelope.opened(head + zlib.crc32(head + b"x").to_bytes(4, "big") + b"x")


# --- on its way through sides -------------------------------------------------------------------------------------


def bundle_with(folder, codec, seed=0):
    parts, _ = make_parts("sample")
    torch.manual_seed(seed)
    torch.nn.init.normal_(parts[1].module.layers[0].weight)
    edges = [edge("head", "tail", cut=codec)]
    return export_bundle(folder, parts, edges, input=INPUT, outputs=OUTPUTS, images=images())


CODINGS = ["packed", "sparse", "tiled_png", "tiled_webp", "tiled_jpeg", "packed_zstd"]


@pytest.mark.parametrize("coding", CODINGS)
def test_sides_of_two_widths_or_two_bundles_do_not_understand_each_other(tmp_path, coding):
    codec = code_codec(coding, SHAPE, 5, quality=70 if coding == "tiled_jpeg" else None)
    mine, theirs = (bundle_with(tmp_path / str(seed), codec, seed) for seed in (0, 1))
    message = Side(mine, "device", bits=4).run(images(), request=0).messages["server"]
    assert Side(mine, "server", bits=4).run(message, request=0).rows == message.rows
    with pytest.raises(CodecError, match="was made at 4 bits, this side reads 5 bits"):
        Side(mine, "server").run(message, request=0)
    with pytest.raises(CodecError, match="was made with another bundle"):
        Side(theirs, "server", bits=4).run(message, request=0)
    with pytest.raises(CodecError):
        Side(mine, "server", bits=4, envelope=False).run(message, request=0)
    bare = Side(mine, "device", bits=4, envelope=False).run(images(), request=0).messages["server"]
    assert [payload[ENVELOPE_BYTES:] for payload in message.payloads["cut"]] == bare.payloads["cut"]
    with pytest.raises(CodecError, match="cut short|damaged"):
        Side(mine, "server", bits=4).run(bare, request=0)


def test_a_tensor_for_another_placement_is_not_taken_for_this_ones(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", "three")
    sent = Side(bundle, "device").run(images(), request=0).messages["edge"]
    wrong = Message(sent.rows, {"next": sent.payloads["cut"]})
    with pytest.raises(CodecError, match="was made"):
        Side(bundle, "server").run(wrong, request=0)


@pytest.mark.parametrize("kind", ["fixed", "sample", "float", "three"])
def test_a_bundle_says_whether_it_has_envelopes(tmp_path, kind):
    with_, without = (make_bundle(tmp_path / str(wanted), kind, envelope=wanted) for wanted in (True, False))
    assert (with_.manifest.envelope, without.manifest.envelope) == (True, False)
    assert json.loads((tmp_path / "False/manifest.json").read_text())["envelope"] is False
    results = [Pipeline(bundle).run(images()) for bundle in (with_, without)]
    more = ENVELOPE_BYTES * len(results[0].payloads)
    assert [n - more for n in results[0].payload_bytes] == results[1].payload_bytes
    assert torch.equal(results[0].logits, results[1].logits)
    assert Pipeline(with_, envelope=False).run(images()).payloads == results[1].payloads
    assert [n - more for n in Pipeline(without, envelope=True).run(images()).payload_bytes] == results[1].payload_bytes


def test_a_policys_state_is_in_envelopes_too(tmp_path):
    policy = build_policy("patience", 1, exits=3)
    bundle = exit_bundle(tmp_path / "bundle", policy, placements=("device", "edge", "cloud"))
    sides = {place: Side(bundle, place) for place in bundle.placements}
    message = sides["device"].run(exit_images(), request=0).messages["edge"]
    assert {len(x) for x in message.payloads["layer1/agreed"]} == {ENVELOPE_BYTES + 4}
    swapped = {**message.payloads, "layer1/agreed": message.payloads["layer1/answered"]}
    with pytest.raises(CodecError, match="was made for another edge"):
        sides["edge"].run(Message(message.rows, swapped), request=0)
    assert sides["edge"].run(message, request=0).messages


@pytest.mark.parametrize("value", [None, 1, "true", []])
def test_a_manifest_with_no_plain_word_on_envelopes_is_refused(tmp_path, value):
    make_bundle(tmp_path / "bundle")
    path = tmp_path / "bundle/manifest.json"
    values = json.loads(path.read_text()) | {"envelope": value}
    del values["digest"]
    path.write_bytes(dump(values | {"digest": digest(values)}))
    with pytest.raises(BundleError, match="envelope has the wrong type"):
        read_manifest(tmp_path / "bundle")


# --- the digest ---------------------------------------------------------------------------------------------------

# RFC 8785, appendix B and section 3.2.
NUMBERS = {
    "-0.0": "0", "5e-324": "5e-324", "1.7976931348623157e+308": "1.7976931348623157e+308", "1e+21": "1e+21",
    "999999999999999900000.0": "999999999999999900000", "1e-06": "0.000001", "1e-07": "1e-7", "1e-05": "0.00001",
    "333333333.33333329": "333333333.3333333", "1e+16": "10000000000000000", "4.50": "4.5", "2e-3": "0.002", "1.0": "1",
    "9007199254740991": "9007199254740991",
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_are_spelled_as_the_standard_does(number):
    assert canonical(json.loads(number)) == NUMBERS[number].encode()


def test_texts_and_keys_are_spelled_as_the_standard_does():
    values = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "\u00f6": 'A"\\\x0f/\x7f'}
    expected = '{"\\r":2,"1":4,"\x80":6,"\u00f6":"A\\"\\\\\\u000f/\x7f","\u20ac":1,"\U0001f600":5,"\ufb33":3}'
    assert canonical(values) == expected.encode()


@pytest.mark.parametrize("value", [2**53, -(2**53), "\ud800", {"\udfff": 1}, float("inf"), float("nan")])
def test_what_no_other_language_could_spell_is_refused_in_words(tmp_path, value):
    with pytest.raises(ValueError, match="no spelling|no Unicode|not JSON compliant"):
        canonical([value])
    with pytest.raises(BundleError, match="metrics and config must be plain finite JSON values"):
        make_bundle(tmp_path / "bundle", config={"value": value})
    assert not (tmp_path / "bundle").exists()


def test_a_manifest_of_a_number_too_large_is_refused_as_a_bundle(tmp_path):
    make_bundle(tmp_path / "bundle")
    path = tmp_path / "bundle/manifest.json"
    values = json.loads(path.read_text()) | {"metrics": {"count": 2**60}}
    path.write_bytes(dump(values))
    with pytest.raises(BundleError, match="the manifest has no digest: it has no spelling by RFC 8785"):
        load_bundle(tmp_path / "bundle")


def test_the_digest_does_not_depend_on_how_floats_are_written(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", config={"rate": 1e-07, "one": 1.0})
    values = json.loads((tmp_path / "bundle/manifest.json").read_text())
    found = values.pop("digest")
    values["config"]["one"] = 1
    assert digest(values) == found == bundle.manifest.digest
