import json
import math
import struct

import numpy as np
import pytest
import torch
import zstandard

from cleave.deployment import (
    CodecError,
    FloatCodec,
    UniformCodec,
    check_bits,
    codec_from_dict,
    pack_bits,
    packed_bytes,
    unpack_bits,
    zstd_bytes,
)

BITS = range(2, 17)


def packed_by_hand(codes, bits):
    """The packing, written down digit by digit."""
    digits = "".join(format(code, f"0{bits}b") for code in codes.tolist())
    digits += "0" * (-len(digits) % 8)
    return bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))


def sent(shape=(3, 4, 5), bits=4, batch=3, low=-1.0, high=2.0, dtype=torch.int32):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (batch, *shape), generator=generator).to(dtype)
    return {"codes": codes, "low": torch.full((batch,), low), "high": torch.full((batch,), high)}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 1000, 4097])
def test_packing_is_exact_dense_and_most_significant_bit_first(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
    payload = pack_bits(codes, bits)
    assert payload == packed_by_hand(codes, bits)
    assert len(payload) == math.ceil(count * bits / 8) == packed_bytes(count, bits)
    found = unpack_bits(payload, count, bits)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_ends_of_the_range_are_packed(bits):
    codes = torch.tensor([0, 2**bits - 1, 0, 2**bits - 1, 2**bits - 1])
    assert torch.equal(unpack_bits(pack_bits(codes, bits), 5, bits).long(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_and_stride_is_packed(dtype):
    codes = torch.arange(16).to(dtype)
    assert pack_bits(codes[::2], 4) == packed_by_hand(codes[::2], 4)


def test_no_codes_take_no_bytes():
    assert pack_bits(torch.zeros(0, dtype=torch.int64), 5) == b""
    assert unpack_bits(b"", 0, 5).shape == (0,)


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 31, 33, 64, 2.0, "8", None, True])
def test_bits_outside_2_to_16_and_32_are_refused_everywhere(bits):
    calls = [
        lambda: check_bits(bits),
        lambda: pack_bits(torch.zeros(3, dtype=torch.int64), bits),
        lambda: unpack_bits(b"abc", 3, bits),
        lambda: UniformCodec((3,), bits),
        lambda: UniformCodec((3,), 4).with_bits(bits),
        lambda: FloatCodec((3,)).with_bits(bits),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"bits must be .*2 to 16.*32") as caught:
            call()
        assert repr(bits) in str(caught.value) or str(bits) in str(caught.value)


def test_bits_that_may_be():
    assert [check_bits(bits) for bits in (*BITS, 32)] == [*BITS, 32]


def test_32_bits_mean_float_where_codes_are_wanted():
    for call in (lambda: UniformCodec((3,), 32), lambda: UniformCodec((3,), 4).with_bits(32)):
        with pytest.raises(CodecError, match="bits=32 means float"):
            call()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([0, 16]), "lie in 0..15, got values from 0 to 16"),
        (torch.tensor([-1, 3]), "got values from -1 to 3"),
        (torch.tensor([1.0]), "must be integers"),
        (torch.tensor([True]), "must be integers"),
        (torch.tensor([[1]]), "must be a vector"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, message):
    with pytest.raises(CodecError, match=message):
        pack_bits(codes, 4)


@pytest.mark.parametrize("length", [0, 3, 5])
def test_a_payload_of_the_wrong_length_is_refused(length):
    with pytest.raises(CodecError, match=f"7 codes of 4 bits take 4 bytes, the payload has {length}"):
        unpack_bits(bytes(length), 7, 4)


def test_padding_that_is_not_zero_is_refused():
    with pytest.raises(CodecError, match="padding"):
        unpack_bits(b"\x00\x00\x00\x01", 7, 4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4, 5), (16, 8)])
@pytest.mark.parametrize("fixed", [True, False])
def test_uniform_round_trip(bits, shape, fixed):
    codec = UniformCodec(shape, bits, *((-1.0, 2.0) if fixed else ()))
    tensors = sent(shape, bits)
    payloads = codec.encode(tensors)
    received = codec.decode(payloads)
    assert tuple(received) == codec.delivers
    for name, tensor in tensors.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)
    assert received["levels"].dtype == torch.int64
    assert received["levels"].shape == ()
    assert received["levels"] == codec.levels == 2**bits
    size = math.ceil(math.prod(shape) * bits / 8) + (0 if fixed else 8)
    assert {len(payload) for payload in payloads} == {size} == {codec.payload_bytes}


def test_a_sample_sends_its_own_range_in_front():
    tensors = sent(bits=6)
    tensors["low"], tensors["high"] = torch.tensor([-1.0, 0.1, 5.0]), torch.tensor([1.0, 0.1, 1e30])
    codec = UniformCodec((3, 4, 5), 6)
    payloads = codec.encode(tensors)
    for i, payload in enumerate(payloads):
        assert payload[:8] == struct.pack("<ff", tensors["low"][i], tensors["high"][i])
        assert payload[8:] == pack_bits(tensors["codes"][i].flatten(), 6)
    received = codec.decode(payloads)
    assert torch.equal(received["low"], tensors["low"])
    assert torch.equal(received["high"], tensors["high"])


def test_a_samples_payload_does_not_depend_on_its_neighbours():
    codec, tensors = UniformCodec((3, 4, 5), 5), sent(bits=5)
    together = codec.encode(tensors)
    assert [codec.encode({k: v[i : i + 1] for k, v in tensors.items()})[0] for i in range(3)] == together


@pytest.mark.parametrize("codec", [UniformCodec((3,), 4), UniformCodec((3,), 4, 0.0, 1.0), FloatCodec((3,))])
def test_an_empty_batch_has_no_payloads(codec):
    received = codec.decode([])
    assert all(len(tensor) == 0 for name, tensor in received.items() if name != "levels")
    assert codec.encode(received) == []


def test_a_fixed_range_is_kept_as_float32():
    codec = UniformCodec((2,), 4, low=0.1, high=0.7)
    assert codec.low == float(np.float32(0.1))
    received = codec.decode([b"\x12"])
    assert torch.equal(received["low"], torch.tensor([0.1]))
    assert torch.equal(received["high"], torch.tensor([0.7]))


def test_bits_change_at_run_time():
    codec = UniformCodec((8,), 8, 0.0, 1.0).with_bits(3)
    assert (codec.bits, codec.levels, codec.payload_bytes, codec.low) == (3, 8, 3, 0.0)
    assert codec.settings["levels"] == 8
    with pytest.raises(CodecError, match=r"0\.\.7"):
        codec.encode(sent((8,), 8, low=0.0, high=1.0))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": None}, "missing codes"),
        ({"low": None, "high": None}, "missing low, high"),
        ({"codes": torch.zeros(3, 4, 5, 3, dtype=torch.int32)}, r"shape \(B, 3, 4, 5\), got \(3, 4, 5, 3\)"),
        ({"codes": torch.zeros(3, 60, dtype=torch.int32)}, r"shape \(B, 3, 4, 5\)"),
        ({"codes": torch.full((3, 3, 4, 5), 16, dtype=torch.int32)}, "from 16 to 16"),
        ({"codes": torch.full((3, 3, 4, 5), -1, dtype=torch.int32)}, "from -1 to -1"),
        ({"codes": torch.zeros(3, 3, 4, 5)}, "must be integers"),
        ({"low": torch.zeros(2)}, r"low must be float32 \(3,\), got float32 \(2,\)"),
        ({"low": torch.tensor(0.0)}, "low must be float32"),
        ({"high": torch.zeros(3, dtype=torch.float64)}, "high must be float32"),
        ({"low": torch.tensor([0.0, NAN, 0.0])}, "range of sample 1 must be finite"),
        ({"high": torch.tensor([1.0, 1.0, INF])}, "range of sample 2 must be finite"),
        ({"low": torch.tensor([0.0, 0.0, 3.0])}, "sample 2 .*low <= high"),
    ],
)
def test_tensors_that_cannot_be_sent_are_refused(change, message):
    tensors = {k: v for k, v in (sent() | change).items() if v is not None}
    with pytest.raises(CodecError, match=message):
        UniformCodec((3, 4, 5), 4).encode(tensors)


def test_another_range_than_the_fixed_one_is_refused():
    tensors = sent()
    tensors["high"] = torch.tensor([2.0, 2.001, 2.0])
    with pytest.raises(CodecError, match=r"the range of sample 1 is .* fixed range is \[-1\.0, 2\.0\]"):
        UniformCodec((3, 4, 5), 4, -1.0, 2.0).encode(tensors)
    tensors["high"] = torch.nextafter(torch.full((3,), 2.0), torch.tensor(3.0))
    assert len(UniformCodec((3, 4, 5), 4, -1.0, 2.0).encode(tensors)) == 3


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b""])
@pytest.mark.parametrize(
    "codec", [UniformCodec((3, 4, 5), 4), UniformCodec((3, 4, 5), 4, -1, 2), FloatCodec((3, 4, 5))]
)
def test_a_truncated_payload_is_refused(codec, change):
    payloads = codec.encode(sent() | {"z": torch.rand(3, 3, 4, 5)})
    payloads[1] = change(payloads[1])
    with pytest.raises(CodecError, match=rf"payload 1 has {len(payloads[1])} bytes instead of {len(payloads[0])}"):
        codec.decode(payloads)


@pytest.mark.parametrize("values", [(NAN, 1.0), (0.0, INF), (1.0, 0.0)])
def test_a_damaged_range_is_refused(values):
    codec = UniformCodec((4,), 4)
    with pytest.raises(CodecError, match="range of sample 0"):
        codec.decode([struct.pack("<ff", *values) + b"\0\0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, "shape must be positive"),
        ({"shape": (3, 0)}, "shape must be positive"),
        ({"shape": (3, -1)}, "shape must be positive"),
        ({"shape": (3, 2.0)}, "shape must be positive"),
        ({"shape": "34"}, "shape must be positive"),
        ({"shape": 3}, "shape must be positive"),
        ({"shape": (2**20, 2**20)}, "more than"),
        ({"low": 0.0}, "go together"),
        ({"low": 1.0, "high": 1.0}, "low must be below high"),
        ({"low": 1.0, "high": 1.0 + 1e-12}, "low must be below high"),
        ({"low": NAN, "high": 1.0}, "low must be a finite"),
        ({"low": 0.0, "high": 1e300}, "high must be a finite"),
        ({"low": "0", "high": 1.0}, "low must be a number"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(CodecError, match=message):
        UniformCodec(**({"shape": (3,), "bits": 4} | arguments))


def test_float_round_trip():
    codec = FloatCodec((2, 3))
    z = torch.tensor([[[0.1, -0.0, 1e-42], [3e38, INF, NAN]]])
    payloads = codec.encode({"z": z})
    assert payloads == [struct.pack("<6f", *z.flatten().tolist())]
    assert codec.payload_bytes == len(payloads[0]) == 24
    assert codec.decode(payloads)["z"].numpy().tobytes() == z.numpy().tobytes()
    assert codec.settings == {}
    assert codec.with_bits(32) is codec
    assert codec.bits == 32


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(1, 3, 2), r"z must have shape \(B, 2, 3\)"),
        (torch.zeros(1, 2, 3, dtype=torch.float16), "float32, got torch.float16"),
        (None, "missing z"),
    ],
)
def test_float_tensors_that_do_not_fit_are_refused(z, message):
    with pytest.raises(CodecError, match=message):
        FloatCodec((2, 3)).encode({} if z is None else {"z": z})


@pytest.mark.parametrize("codec", [UniformCodec((3, 4), 5), UniformCodec((3,), 4, -0.1, 0.3), FloatCodec((3,))])
def test_codecs_round_trip_through_json(codec):
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict()))) == codec


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "morse", "shape": [3]}, "unknown codec kind 'morse'; known are .*float32, .*uniform"),
        ({"shape": [3]}, "needs a kind, one of .*float32, .*uniform"),
        (["uniform"], "needs a kind"),
        ({"kind": ["uniform"]}, "needs a kind"),
        ({"kind": "float32"}, r"takes the keys \['shape'\], got \[\]"),
        ({"kind": "float32", "shape": [3], "bits": 32}, "takes the keys"),
        ({"kind": "uniform", "shape": [3], "bits": 4}, "takes the keys"),
    ],
)
def test_a_description_that_is_wrong_is_refused(values, message):
    with pytest.raises(CodecError, match=message):
        codec_from_dict(values)


def test_zstd_bytes_is_the_length_of_a_level_1_frame():
    payload = pack_bits(torch.zeros(5000, dtype=torch.int64), 8)
    assert zstd_bytes(payload) == len(zstandard.compress(payload, 1)) < 50
    assert zstd_bytes(b"") > 0
