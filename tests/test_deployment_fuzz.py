"""Bundles and payloads as an attacker or a broken disk leaves them: accepted, or refused by a documented error."""

import contextlib
import copy
import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from cleave.deployment import (
    BundleError,
    CodecError,
    EntropyCodec,
    FileEntry,
    FloatCodec,
    Manifest,
    Pipeline,
    SparseCodec,
    UniformCodec,
    ZstdCodec,
    build_policy,
    load_bundle,
)
from cleave.deployment.bundle.canonical_json import digest, dump, parse
from cleave.deployment.codecs.image_codecs import JPEGCodec, PNGCodec, WebPCodec
from cleave.deployment.codecs.tiled_image import TiledImageCodec

from .deployment_networks import exit_bundle, images, make_bundle

DEEP = []
for _ in range(200):
    DEEP = [DEEP]
ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 16, 2**31, -(2**63), 10**400, -(10**400), 0.0, -0.0, 0.5, 1.5, 1e308, -1e-320),
    *("", "3", "L", "images", "cut", "head", "../x", "\ud800", "é" * 300, "a" * 70_000, [], {}, [[]], {"kind": "zstd"}),
    *([-1], [-1, 0], [-1, 2**40, 2**40], ["L"], [1] * 5000, ["x"] * 5000, {"a": 1}, {"kind": ["image"]}, DEEP),
    *(
        {"kind": "uniform", "shape": [4], "bits": [4], "low": None, "high": None},
        {"kind": "float32", "shape": [1] * 99},
    ),
    {"kind": "tiled_image", "shape": [4, 4, 4], "bits": 4, "low": 0, "high": 1, "format": ["png"], "quality": "9"},
    {"kind": "entropy", "shape": [1], "lows": [0], "frequencies": [[65536]], "axis": -1.0},
    {"kind": "ensemble", "thresholds": [[]], "temperatures": {}, "latest": 1.0, "weights": [1], "log_bias": [[1e308]]},
    {"kind": "tensor", "shape": [2], "dtype": ["uint8"], "name": "images"},
]


def places(values, path=()):
    """Paths of everything within JSON values."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutate(values, everywhere, generator):
    """Change one to three things anywhere in a manifest."""
    values = copy.deepcopy(values)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        path = generator.choice(everywhere)
        with contextlib.suppress(LookupError, TypeError):  # an earlier change took that place away
            change(values, path, everywhere, generator)
    return values


def change(values, path, everywhere, generator):
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    key, how = path[-1], generator.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        holder.insert(generator.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif how == 2 and isinstance(holder, dict):
        holder[generator.choice(("kind", "extra", "shape", ""))] = holder.pop(key)
    elif how == 3:
        other = values
        for step in generator.choice(everywhere):
            other = other[step]
        holder[key] = copy.deepcopy(other)
    else:
        holder[key] = copy.deepcopy(generator.choice(ODD))


def manifests(folder):
    for kind in ("fixed", "sample", "float", "three"):
        yield make_bundle(folder / kind, kind, config={"seed": [0, {"a": 1.5}]}, metrics={"accuracy": 0.9}).directory
    for kind, settings in (("patience", {"thresholds": 1}), ("ensemble", {"thresholds": 0.5, "temperatures": 1.5})):
        policy = build_policy(kind, exits=3, **settings)
        yield exit_bundle(folder / kind, policy, placements=("device", "edge", "server")).directory


def refused(content):
    """Why a manifest is refused; ``None`` if it is accepted."""
    try:
        Manifest.from_dict(parse(content))
    except ValueError as error:
        return str(error)
    return None


def try_manifests(folder, count, seed):
    """Return how many of the changed manifests were accepted."""
    originals = [json.loads((path / "manifest.json").read_text()) for path in manifests(folder)]
    everywhere = [[path for path in places(values) if path] for values in originals]
    generator, accepted = random.Random(seed), 0
    for number in range(count):
        which = number % len(originals)
        values = mutate(originals[which], everywhere[which], generator)
        try:
            values["digest"] = digest({key: value for key, value in values.items() if key != "digest"})
            content = dump(values)
        except (RecursionError, ValueError):  # no JSON could hold it
            continue
        if (refusal := refused(content)) is None:
            accepted += 1
        elif len(refusal) > 5000:
            raise AssertionError(f"{len(refusal)} characters: {refusal:.200}")
    return accepted


CODECS = [
    FloatCodec((2, 3)),
    UniformCodec((3, 5), 3, 0.0, 1.0),
    UniformCodec((3, 5), 4),
    UniformCodec((16,), 16, 0.0, 1.0),
    SparseCodec((3, 5), 4, 0.0, 1.0),
    SparseCodec((3, 5), 7),
    ZstdCodec(UniformCodec((40,), 8, 0.0, 1.0)),
    ZstdCodec(SparseCodec((40,), 5)),
    EntropyCodec((2, 4), (-1, 0), ((16384, 32768, 16384), (65000, 536))),
    *(TiledImageCodec((3, 4, 4), 4, 0.0, 1.0, format=form) for form in ("png", "webp")),
    TiledImageCodec((3, 4, 4), 4, format="jpeg", quality=70),
]
PICTURES = [JPEGCodec((3, 9, 8), 50), WebPCodec((3, 9, 8)), WebPCodec((3, 9, 8), 50), PNGCodec((1, 9, 8))]


def payloads_of(codec):
    generator = torch.Generator().manual_seed(1)
    if isinstance(codec, FloatCodec):
        return codec.encode({"z": torch.randn(2, *codec.shape, generator=generator)})
    low = getattr(codec, "lows", (0,))[0]
    least = torch.full((2, *codec.shape), low)
    if isinstance(codec, EntropyCodec):
        least[:, 1] = 0
        return codec.encode({"codes": least + torch.randint(0, 2, least.shape, generator=generator)})
    codes = torch.randint(0, codec.levels, (2, *codec.shape), generator=generator)
    return codec.encode({"codes": codes, "low": torch.zeros(2), "high": torch.ones(2)})


def damage(payload, generator):
    """Change bits, cut, repeat or replace part of a payload."""
    found = bytearray(payload)
    for _ in range(generator.choice((1, 1, 2, 5))):
        how, at = generator.randrange(6), generator.randrange(len(found) + 1)
        if how == 0 and at < len(found):
            found[at] ^= 1 << generator.randrange(8)
        elif how == 1:
            del found[at:]
        elif how == 2:
            found[at:at] = generator.randbytes(generator.randrange(1, 9))
        elif how == 3:
            found[at:at] = found[: generator.randrange(len(found) + 1)]
        elif how == 4:
            found = bytearray(generator.randbytes(generator.randrange(200)))
        else:
            del found[at : at + generator.randrange(1, 5)]
    return generator.choice((bytes, bytearray, memoryview))(found)


def try_payloads(count, seed):
    """Damage payloads; return how many were decoded all the same."""
    generator = random.Random(seed)
    sound = [payloads_of(codec) for codec in CODECS]
    pictures = [codec.encode(torch.randint(0, 256, codec.shape).to(torch.uint8)) for codec in PICTURES]
    decoded = 0
    for number in range(count):
        which = number % (len(CODECS) + len(PICTURES))
        if which >= len(CODECS):
            codec, payload = PICTURES[which - len(CODECS)], pictures[which - len(CODECS)]
            with contextlib.suppress(CodecError):
                assert codec.decode(damage(payload, generator)).shape == codec.shape
                decoded += 1
            continue
        codec, (first, second) = CODECS[which], sound[which]
        with contextlib.suppress(CodecError):
            tensors = codec.decode([first, damage(second, generator)])
            assert tensors.keys() == set(codec.delivers)
            decoded += 1
    return decoded


def try_files(folder, count, seed):
    """Damage files of a bundle whose manifest fits them; return how many were loaded all the same."""
    original = make_bundle(folder / "original", "sample").directory
    names = ["head.pt", "tail.pt", "sample.device.safetensors", "sample.server.safetensors"]
    generator, loaded = random.Random(seed), 0
    for number in range(count):
        target = Path(shutil.copytree(original, folder / "damaged", dirs_exist_ok=True))
        name = names[number % len(names)]
        (target / name).write_bytes(bytes(damage((target / name).read_bytes(), generator)) or b"\0")
        values = json.loads((target / "manifest.json").read_text())
        entry = dataclasses.asdict(FileEntry.of(target / name))
        for item in (*values["samples"].values(), *values["partitions"]):
            if item["file"] == name:
                item.update(entry)
        values["digest"] = digest({key: value for key, value in values.items() if key != "digest"})
        (target / "manifest.json").write_bytes(dump(values))
        with contextlib.suppress(BundleError, CodecError):
            bundle = load_bundle(target)
            bundle.self_test()
            Pipeline(bundle).run(images(2))
            loaded += 1
    return loaded


def test_changed_manifests_payloads_and_files_are_refused_by_documented_errors(tmp_path):
    assert try_manifests(tmp_path / "manifests", 200, seed=0) < 100
    assert 0 < try_payloads(500, seed=0) < 500
    assert try_files(tmp_path, 16, seed=0) < 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifteen_thousand_changed_manifests(tmp_path):
    assert 0 < try_manifests(tmp_path, 15_000, seed=1) < 7_500


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_thousand_damaged_payloads():
    assert 0 < try_payloads(20_000, seed=1) < 20_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_damaged_files(tmp_path):
    assert try_files(tmp_path, 500, seed=1) < 250
