import builtins
import copy
import heapq
import itertools
import json
import math
import pickle
import sys
import zlib

import numpy as np
import pytest
import torch

from cleave.architectures import entropy_codec
from cleave.deployment import CODECS, CodecError, EntropyCodec, ZstdCodec, codec_from_dict, integer_frequencies
from cleave.deployment.codecs.coder import stream
from cleave.deployment.codecs.entropy_codec import (
    _MAX_ENTRIES,
    CHECK_BYTES,
    MAX_CODE,
    MAX_SYMBOLS,
    TOTAL,
    _shortest,
    exact_model,
)

QUARTERS = (16384, 32768, 16384)


def make_codec(shape=(6, 4, 4), axis=0, seed=0, symbols=12):
    generator = np.random.default_rng(seed)
    channels = shape[axis]
    sizes = generator.integers(2, symbols + 1, channels)
    tables = [(int(generator.integers(-40, 40)), generator.dirichlet(np.full(size, 0.5))) for size in sizes]
    return EntropyCodec.from_tables(shape, tables, axis)


def draw(codec, batch=5, seed=0):
    """Codes that follow the codec's own tables."""
    generator = np.random.default_rng(seed)
    positions = math.prod(codec.shape) // len(codec.lows)
    channels = [
        low + generator.choice(len(table), (batch, positions), p=np.array(table) / TOTAL)
        for low, table in zip(codec.lows, codec.frequencies, strict=True)
    ]
    rest = codec.shape[1:] if codec.axis == 0 else codec.shape[:-1]
    codes = torch.from_numpy(np.stack(channels, 1)).reshape(batch, len(channels), *rest)
    return (codes if codec.axis == 0 else codes.movedim(1, -1)).to(torch.int32).contiguous()


@pytest.mark.parametrize(
    ("shape", "axis"), [((7,), 0), ((7,), -1), ((3, 4, 5), 0), ((9, 5), -1), ((4, 6, 3), -1), ((1, 1, 1), 0)]
)
def test_decoding_gives_exactly_the_codes(shape, axis):
    codec = make_codec(shape, axis)
    codes = draw(codec)
    payloads = codec.encode({"codes": codes})
    received = codec.decode(payloads)
    assert tuple(received) == codec.delivers == codec.sends
    assert received["codes"].dtype == torch.int32
    assert received["codes"].is_contiguous()
    assert torch.equal(received["codes"], codes)


def test_the_axis_says_where_the_channels_stand():
    tokens = make_codec((5, 4), axis=-1)
    codes = draw(tokens)
    maps = EntropyCodec((4, 5), tokens.lows, tokens.frequencies)
    assert tokens.encode({"codes": codes}) == maps.encode({"codes": codes.mT})
    with pytest.raises(CodecError, match="one entry for each of the 5 channels"):
        EntropyCodec((5, 4), tokens.lows, tokens.frequencies, axis=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_any_integer_dtype_and_stride_is_coded(dtype):
    codec = make_codec()
    codes = draw(codec)
    strided = torch.stack([codes, codes + 1], -1)[..., 0].to(dtype)
    assert codec.encode({"codes": strided}) == codec.encode({"codes": codes})


def test_a_samples_payload_does_not_depend_on_its_neighbours():
    codec = make_codec()
    codes = draw(codec)
    together = codec.encode({"codes": codes})
    assert [codec.encode({"codes": codes[i : i + 1]})[0] for i in range(5)] == together
    assert torch.equal(codec.decode(together[2:3])["codes"], codes[2:3])


def test_an_empty_batch_has_no_payloads():
    codec = make_codec()
    received = codec.decode([])
    assert received["codes"].shape == (0, 6, 4, 4)
    assert codec.encode(received) == []


def test_a_channel_with_one_code_takes_no_bits():
    codec = EntropyCodec((2, 8), (5, -1), ((TOTAL,), QUARTERS))
    codes = torch.stack([torch.full((8,), 5), torch.tensor([-1, 0, 1, 0, 0, 0, -1, 1])])[None]
    (payload,) = codec.encode({"codes": codes})
    assert torch.equal(codec.decode([payload])["codes"].long(), codes)
    assert codec.estimated_bits(codes).item() == 12
    alone = EntropyCodec((1, 8), (5,), ((TOTAL,),))
    (payload,) = alone.encode({"codes": codes[:, :1]})
    assert len(payload) == CHECK_BYTES
    assert torch.equal(alone.decode([payload])["codes"].long(), codes[:, :1])


def test_the_check_is_a_crc32_of_bitstream_and_codes():
    codec = make_codec()
    codes = draw(codec, batch=1)
    (payload,) = codec.encode({"codes": codes})
    content = payload[:-CHECK_BYTES] + codes.numpy().astype("<i4").tobytes()
    assert payload[-CHECK_BYTES:] == zlib.crc32(content).to_bytes(4, "big")


# --- length ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_bitstream_is_less_than_a_byte_longer_than_the_ideal(seed):
    codec = make_codec((8, 4, 4), seed=seed, symbols=30)
    codes = draw(codec, batch=200, seed=seed)
    ideal = codec.estimated_bits(codes)
    lengths = 8 * torch.tensor([len(payload) - CHECK_BYTES for payload in codec.encode({"codes": codes})])
    assert (lengths - ideal).max() < 8.01  # whole bytes; of the tables nothing is rounded
    assert 2 < (lengths - ideal).mean() < 5  # now and then a rounder number lies in the interval
    entropy = sum(-(p * np.log2(p)).sum() for p in (np.array(t) / TOTAL for t in codec.frequencies)) * 16
    assert ideal.mean().item() == pytest.approx(entropy, rel=0.03)


def test_estimated_bits_by_hand():
    codec = EntropyCodec((2, 2), (-1, 0), (QUARTERS, (TOTAL - 64, 64)))
    codes = torch.tensor([[[-1, 0], [1, 0]], [[0, 0], [0, 0]]])
    common = -math.log2(1 - 64 / TOTAL)
    torch.testing.assert_close(codec.estimated_bits(codes), torch.tensor([13 + common, 2 + 2 * common]).double())


def decodes(bitstream, model, symbols):
    words = np.frombuffer(bitstream + bytes(-len(bitstream) % 4 + 8), ">u4").astype(np.uint32)
    try:
        return np.array_equal(stream().queue.RangeDecoder(words).decode(model, len(symbols)), symbols)
    except AssertionError:
        return False


def test_no_shorter_bitstream_decodes_to_the_symbols():
    generator = np.random.default_rng(0)
    for _ in range(300):
        count, length = generator.integers(2, 30), generator.integers(1, 40)
        frequencies = integer_frequencies(generator.dirichlet(np.full(count, generator.choice([0.05, 0.3, 1, 10]))))
        model = exact_model(frequencies)
        symbols = generator.choice(count, length, p=np.array(frequencies) / TOTAL).astype(np.int32)
        encoder = stream().queue.RangeEncoder()
        encoder.encode(symbols, model)
        shortest = _shortest(encoder)
        assert decodes(shortest, model, symbols)
        assert len(shortest) <= 4 * encoder.num_words()
        if not shortest:
            continue
        # One byte less leaves two candidates: the value cut off there, and the next one up.
        value, bytes_less = int.from_bytes(shortest[:-1], "big"), len(shortest) - 1
        for candidate in (value - 1, value, value + 1):
            if 0 <= candidate < 256**bytes_less:
                assert not decodes(candidate.to_bytes(bytes_less, "big"), model, symbols)


@pytest.mark.parametrize("rare", [1, 2000, MAX_SYMBOLS - 1])
def test_no_payload_is_longer_than_the_most(rare):
    table = [TOTAL - MAX_SYMBOLS + 1] + [1] * (MAX_SYMBOLS - 1)
    codec = EntropyCodec((1, 500), (0,), (tuple(table),))
    codes = torch.full((1, 1, 500), rare)
    payloads = codec.encode({"codes": codes})
    assert len(payloads[0]) == pytest.approx(1000 + CHECK_BYTES, abs=2)
    assert len(payloads[0]) <= codec.max_payload_bytes
    assert torch.equal(codec.decode(payloads)["codes"].long(), codes)


# --- damage ------------------------------------------------------------------------------------------------------


def test_every_truncation_and_extension_is_found_out():
    codec = make_codec()
    payloads = codec.encode({"codes": draw(codec)})
    for index, payload in enumerate(payloads):
        changed = [payload[:n] for n in range(len(payload))] + [payload[n:] for n in range(1, len(payload))]
        changed += [payload + b"\0", payload[:-CHECK_BYTES] + b"\0" + payload[-CHECK_BYTES:], payload + bytes(10**4)]
        for damaged in changed:
            with pytest.raises(CodecError, match=f"payload {index} "):
                codec.decode([*payloads[:index], damaged, *payloads[index + 1 :]])


def test_every_altered_byte_is_found_out():
    codec = make_codec((3, 3, 3))
    (payload,) = codec.encode({"codes": draw(codec, batch=1)})
    for place, change in itertools.product(range(len(payload)), range(1, 256)):
        damaged = bytearray(payload)
        damaged[place] ^= change
        with pytest.raises(CodecError, match="payload 0 is damaged"):
            codec.decode([bytes(damaged)])


def test_random_bytes_are_found_out():
    codec, generator = make_codec(), np.random.default_rng(0)
    for length in generator.integers(0, codec.max_payload_bytes + 1, 300):
        with pytest.raises(CodecError, match="payload 0"):
            codec.decode([generator.bytes(length)])


def test_other_tables_than_the_senders_are_found_out():
    codec = make_codec()
    payloads = codec.encode({"codes": draw(codec)})
    shifted = EntropyCodec(codec.shape, tuple(low + 1 for low in codec.lows), codec.frequencies)
    for other in (shifted, EntropyCodec(codec.shape, codec.lows, tuple(t[::-1] for t in codec.frequencies))):
        with pytest.raises(CodecError, match="encoded with other tables"):
            other.decode(payloads)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (None, "missing codes"),
        (torch.zeros(2, 2, 2), "must be integers, got torch.float32"),
        (torch.zeros(2, 2, 2, dtype=torch.bool), "must be integers, got torch.bool"),
        (torch.zeros(2, 4, dtype=torch.int32), r"shape \(B, 2, 2\), got \(2, 4\)"),
        (torch.tensor([[[0, 0], [0, 0]], [[0, 0], [0, 2]]]), r"channel 1 lie in 0\.\.1, sample 1 has 2"),
        (torch.tensor([[[-2, 0], [0, 0]]]), r"channel 0 lie in -1\.\.1, sample 0 has -2"),
        (torch.tensor([[[2**40, 0], [0, 0]]]), "sample 0 has 1099511627776"),
        (torch.tensor([[[-(2**31), 0], [0, 0]]], dtype=torch.int32), "sample 0 has -2147483648"),
        (torch.tensor([[[2**31 - 1, 0], [0, 0]]], dtype=torch.int32), "sample 0 has 2147483647"),
    ],
)
def test_codes_that_cannot_be_sent_are_refused(codes, message):
    codec = EntropyCodec((2, 2), (-1, 0), (QUARTERS, (65000, 536)))
    with pytest.raises(CodecError, match=message):
        codec.encode({} if codes is None else {"codes": codes})
    if codes is not None:
        with pytest.raises(CodecError, match=message):
            codec.estimated_bits(codes)


LONG = (TOTAL - MAX_SYMBOLS, *[1] * MAX_SYMBOLS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (0, 2)}, "shape must be positive"),
        ({"axis": 1}, "axis must be 0"),
        ({"axis": False}, "axis must be 0"),
        ({"axis": "0"}, "axis must be 0"),
        ({"lows": (0,)}, "lows must have one entry for each of the 2 channels"),
        ({"lows": (0, 0.5)}, "lows must be whole numbers"),
        ({"lows": (0, True)}, "lows must be whole numbers"),
        ({"lows": "00"}, "lows must be whole numbers"),
        ({"lows": 3}, "lows must be whole numbers"),
        ({"lows": (0, -MAX_CODE - 1)}, "lows must be whole numbers of at least -16777216"),
        ({"lows": (0, MAX_CODE)}, "codes must lie in ±16777216"),
        ({"frequencies": (QUARTERS,)}, "frequencies must have one entry for each of the 2 channels"),
        ({"frequencies": None}, "frequencies must hold one list for each channel"),
        ({"frequencies": "ab"}, "frequencies must hold one list for each channel"),
        ({"frequencies": (QUARTERS, 65536)}, r"frequencies\[1\] must be whole numbers"),
        ({"frequencies": (QUARTERS, ())}, r"frequencies\[1\] must be whole numbers"),
        ({"frequencies": (QUARTERS, (TOTAL, 0))}, r"frequencies\[1\] must be whole numbers of at least 1"),
        ({"frequencies": (QUARTERS, (1.0, TOTAL - 1.0))}, r"frequencies\[1\] must be whole numbers of at least 1"),
        ({"frequencies": (QUARTERS, (TOTAL, 1))}, r"frequencies\[1\] .* sum to 65536, got 2 that sum to 65537"),
        ({"frequencies": (QUARTERS, LONG)}, r"frequencies\[1\] must be at most 4096 numbers .* got 4097"),
        ({"frequencies": (QUARTERS, (1,) * (_MAX_ENTRIES + 1))}, "frequencies may have 524288 entries"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(change, message):
    arguments = {"shape": (2, 2), "lows": (-1, 0), "frequencies": (QUARTERS, (65000, 536))}
    EntropyCodec(**arguments)
    with pytest.raises(CodecError, match=message):
        EntropyCodec(**(arguments | change))


def test_there_is_no_width_to_choose():
    codec = make_codec()
    with pytest.raises(CodecError, match="knows no widths; leave bits out, got 4"):
        codec.with_bits(4)
    with pytest.raises(CodecError, match="no width of codes"):
        codec.bits  # noqa: B018
    assert codec.settings == {}


def test_a_missing_coder_is_named_with_its_cure(monkeypatch):
    codec, given = make_codec(), builtins.__import__

    def without(name, *arguments, **settings):
        if name == "constriction":
            raise ImportError(name)
        return given(name, *arguments, **settings)

    stream.cache_clear()
    monkeypatch.delitem(sys.modules, "constriction", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    calls = [
        lambda: codec.encode({"codes": draw(codec)}),
        lambda: codec.decode([bytes(10)]),
        codec.prepare,
        ZstdCodec(codec).prepare,
        lambda: entropy_codec((4, 4, 4)),  # before any training
    ]
    for call in calls:
        with pytest.raises(CodecError, match=r"extra `entropy`: pip install constriction.*ARM Linux"):
            call()
    assert codec_from_dict(codec.to_dict()) == codec
    monkeypatch.undo()
    assert len(codec.encode({"codes": draw(codec)})) == 5


# --- description -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, -1])
def test_it_round_trips_through_json(axis):
    codec = make_codec((6, 6), axis)
    assert CODECS["entropy"] is EntropyCodec
    found = codec_from_dict(json.loads(json.dumps(codec.to_dict())))
    assert found == codec
    assert isinstance(found.frequencies[0], tuple)
    payloads = codec.encode({"codes": draw(codec)})
    assert torch.equal(found.decode(payloads)["codes"], draw(codec))


def test_it_is_copied_and_pickled_after_use():
    codec = make_codec()
    payloads = codec.encode({"codes": draw(codec)})
    for twin in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):  # noqa: S301
        assert twin == codec
        assert twin.encode({"codes": draw(codec)}) == payloads


# --- frequencies -------------------------------------------------------------------------------------------------


def best_frequencies(p):
    """The least expected length there is, unit by unit: each goes where it gains the most."""
    frequencies = [1] * len(p)
    heap = [(-q * math.log1p(1.0), i) for i, q in enumerate(p)]
    heapq.heapify(heap)
    for _ in range(TOTAL - len(p)):
        _, i = heapq.heappop(heap)
        frequencies[i] += 1
        heapq.heappush(heap, (-p[i] * math.log1p(1 / frequencies[i]), i))
    return np.array(frequencies)


@pytest.mark.parametrize(("size", "evenness"), [(2, 1.0), (7, 0.1), (40, 0.05), (300, 0.02)])
def test_frequencies_are_the_best_there_are(size, evenness):
    p = np.random.default_rng(size).dirichlet(np.full(size, evenness))
    found = np.array(integer_frequencies(p))
    assert found.sum() == TOTAL
    assert found.min() >= 1
    cost, least = (-(p * np.log2(f / TOTAL)).sum() for f in (found, best_frequencies(p)))
    assert cost == pytest.approx(least, abs=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, MAX_SYMBOLS])
def test_frequencies_of_the_extremes(size):
    even = integer_frequencies(np.ones(size))
    assert sum(even) == TOTAL
    assert max(even) - min(even) <= 1
    peaked = integer_frequencies(np.eye(size)[0])
    assert peaked == (TOTAL - size + 1, *[1] * (size - 1))


@pytest.mark.parametrize(
    "probabilities", [[], [[0.5, 0.5]], [0.5, -0.5], [0.5, math.nan], [math.inf], [0.0, 0.0], np.ones(MAX_SYMBOLS + 1)]
)
def test_what_are_no_probabilities_is_refused(probabilities):
    with pytest.raises(CodecError, match="probabilities must be 1 to 4096 values"):
        integer_frequencies(probabilities)


# --- the format, as docs/bundle.md describes it -------------------------------------------------------------------


def decoded_by_the_document(lows, frequencies, count, bitstream):
    """The decoder of docs/bundle.md, in whole numbers."""
    most = 2**64 - 1
    data = bitstream + bytes(-len(bitstream) % 4 + 8)
    words = [int.from_bytes(data[i : i + 4], "big") for i in range(0, len(data), 4)]
    point, position, low, width, found = words[0] << 32 | words[1], 2, 0, most, []
    for least, table in zip(lows, frequencies, strict=True):
        edges = [256 * sum(table[:s]) for s in range(len(table) + 1)]
        for _ in range(count):
            symbol = 0
            if len(table) > 1:
                step = width >> 24
                place = (point - low & most) // step
                symbol = max(s for s in range(len(table)) if edges[s] <= place)
                low, width = low + step * edges[symbol] & most, step * (edges[symbol + 1] - edges[symbol])
                if width < 2**32:
                    low, width, point = low << 32 & most, width << 32, point << 32 & most
                    point, position = point | (words[position] if position < len(words) else 0), position + 1
            found.append(least + symbol)
    return found


def encoded_by_the_document(lows, frequencies, rows):
    """The encoder of docs/bundle.md, in whole numbers without an end."""
    low, width, words = 0, 2**64 - 1, 2
    for least, table, row in zip(lows, frequencies, rows, strict=True):
        for symbol in (int(code) - least for code in row) if len(table) > 1 else ():
            step = width >> 24
            low, width = low + step * 256 * sum(table[:symbol]), step * 256 * table[symbol]
            if width < 2**32:
                low, width, words = low << 32, width << 32, words + 1
    high = low + width - 1
    zeros = next(n for n in itertools.count() if high >> n + 1 << n + 1 < low) if low else 0
    return (high >> zeros << zeros if low else 0).to_bytes(4 * words, "big").rstrip(b"\0")


@pytest.mark.parametrize("evenness", [0.02, 0.3, 5])
@pytest.mark.parametrize("size", [2, 3, 17, 300, MAX_SYMBOLS])
def test_a_frequency_is_coded_as_it_is(size, evenness):
    """The coder's own whole numbers are 256 times the tables': it rounds nothing."""
    generator = np.random.default_rng(size)
    for table in (
        integer_frequencies(generator.dirichlet(np.full(size, evenness))),
        integer_frequencies(np.ones(size)),
    ):
        symbols = np.unique(generator.integers(0, size, 40)).astype(np.int32)
        for symbol in symbols:
            encoder = stream().queue.RangeEncoder()
            encoder.encode(np.array([symbol], np.int32), exact_model(table))
            (low, width), step = encoder.pos()[1], (2**64 - 1) >> 24
            assert (low, width) == (step * 256 * sum(table[:symbol]), step * 256 * table[symbol])


@pytest.mark.parametrize("seed", range(8))
def test_payloads_are_those_of_the_document(seed):
    generator = np.random.default_rng(seed)
    sizes, lows = generator.integers(1, 40, 3).tolist(), tuple(generator.integers(-20, 5, 3).tolist())
    tables = tuple(integer_frequencies(generator.dirichlet(np.full(size, 0.3))) for size in sizes)
    codec = EntropyCodec((3, 4, 5), lows, tables)
    draws = [generator.choice(n, p=np.array(t) / 65536, size=20) for n, t in zip(sizes, tables, strict=True)]
    codes = np.stack([low + draw for low, draw in zip(lows, draws, strict=True)]).astype(np.int32)
    (payload,) = codec.encode({"codes": torch.from_numpy(codes.reshape(1, 3, 4, 5))})
    assert decoded_by_the_document(lows, tables, 20, payload[:-4]) == codes.ravel().tolist()
    assert encoded_by_the_document(lows, tables, codes) == payload[:-4]
    assert payload[-4:] == zlib.crc32(payload[:-4] + codes.astype("<i4").tobytes()).to_bytes(4, "big")
