"""A reader in another language, written after docs/bundle.md, makes the same bytes and the same logits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cleave.deployment import (
    EntropyCodec,
    ImageInput,
    Part,
    Pipeline,
    build_policy,
    code_codec,
    export_bundle,
)
from cleave.deployment.bundle.canonical_json import digest, dump

from .deployment_networks import (
    INPUT,
    OUTPUTS,
    SHAPE,
    Encoder,
    Server,
    edge,
    exit_bundle,
    images,
    make_bundle,
    make_parts,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="there is no C++ compiler"),
]
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cpp"
TIERS = ("device", "edge", "cloud")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    build = tmp_path_factory.mktemp("cpp")
    command = ["make", "-C", str(EXAMPLE), f"PYTHON={sys.executable}", f"BUILD={build}", "CXXFLAGS=-O0"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-4000:]
    return build / "reader"


def read(reader, folder, *arguments):
    """Payloads by tensor and placement and row, answers by row, of a bundle's own sample batch."""
    command = [str(reader), str(folder), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    payloads, answers = {}, {}
    for kind, *words in (line.split(" ") for line in ran.stdout.splitlines()):
        if kind == "payload":
            payloads[words[0], words[1], int(words[2])] = bytes.fromhex(words[3])
        else:
            answers[int(words[0])] = int(words[1]), [float(value) for value in words[2:]]
    return payloads, answers


class Rounding(Encoder):
    """Codes of a learned prior: whole numbers that differ from channel to channel in how far they spread."""

    def forward(self, images):
        return (super().forward(images) * torch.tensor([2.0, 5.0, 9.0, 0.2]).view(-1, 1, 1)).round().to(torch.int32)


class Tokens(Rounding):
    def forward(self, images):
        return super().forward(images).flatten(2).mT.contiguous()


class Received(Server):
    def forward(self, codes):
        maps = codes if codes.ndim == 4 else codes.mT.unflatten(2, SHAPE[1:])
        return super().forward(maps.float())


def entropy_bundle(folder, axis, **settings):
    torch.manual_seed(4)
    generator = np.random.default_rng(0)
    tables = [(-n, generator.dirichlet(np.full(2 * n + 1, 0.7))) for n in (2, 5, 9, 0)]
    shape = SHAPE if axis == 0 else (16, 4)
    parts = [
        Part("head", "device", Rounding() if axis == 0 else Tokens(), ("images",), ("cut.codes",)),
        Part("tail", "server", Received(), ("cut.codes",), ("logits",)),
    ]
    edges = [edge("head", "tail", cut=EntropyCodec.from_tables(shape, tables, axis))]
    return export_bundle(folder, parts, edges, input=INPUT, outputs=OUTPUTS, images=images(9), **settings)


CONFIG = {"rate": 1e-05, "huge": 1.5e300, "é\U0001f600": ['\x01"\\', 0.1, -0.0, 123456789012345.0], "￮": None}
BUNDLES = {
    "uniform": lambda folder: make_bundle(folder, "fixed", config=CONFIG),
    "per sample": lambda folder: make_bundle(folder, "sample"),
    "without an envelope": lambda folder: make_bundle(folder, "sample", envelope=False),
    "float": lambda folder: make_bundle(folder, "float"),
    "whole": lambda folder: make_bundle(folder, "whole"),
    "three placements": lambda folder: make_bundle(folder, "three"),
    "entropy": lambda folder: entropy_bundle(folder, axis=0),
    "entropy of tokens": lambda folder: entropy_bundle(folder, axis=-1, envelope=False),
    "exits": lambda folder: exit_bundle(folder, None, placements=TIERS, split="layer1"),
    **{
        f"exits by {kind}": lambda folder, kind=kind, threshold=threshold: exit_bundle(
            folder, build_policy(kind, threshold, exits=3), placements=TIERS, split="layer1", seed=3, cascade=True
        )
        for kind, threshold in (
            ("confidence", 0.6),
            ("entropy", 0.6),
            ("margin", 0.4),
            ("patience", 1),
            ("ensemble", 0.5),
        )
    },
    "an ensemble past a placement": lambda folder: exit_bundle(
        folder,
        build_policy(
            "ensemble",
            [0.5],
            exits=2,
            temperatures=[0.5, 2.0],
            weights=[[1.0, 0.0], [0.25, 0.75]],
            log_bias=[[0.1, 0.0, 0.0, 0.2], [0.0, 0.3, 0.0, 0.0]],
        ),
        placements=TIERS,
        exits=("layer1", "final"),
    ),
    "a deadline": lambda folder: exit_bundle(
        folder, build_policy("patience", 1, exits=3).with_deadline(250, costs=[100, 200, 300]), placements=TIERS
    ),
    "exits on two sides": lambda folder: exit_bundle(
        folder, build_policy("confidence", (0.6, None), exits=3), placements=("device", "device", "server"), seed=3
    ),
}


def sample(bundle):
    entry = bundle.manifest.route.entry
    return bundle.samples[entry][bundle.input.name if not isinstance(bundle.input, ImageInput) else "images"]


@pytest.mark.parametrize("name", BUNDLES)
def test_payloads_are_equal_byte_by_byte_and_logits_within_a_hundred_thousandth(reader, tmp_path, name):
    bundle = BUNDLES[name](tmp_path / "bundle")
    check(reader, bundle)


@pytest.mark.parametrize("bits", [2, 7, 16])
@pytest.mark.parametrize("kind", ["fixed", "three"])
def test_another_width_is_told_to_both(reader, tmp_path, kind, bits):
    check(reader, make_bundle(tmp_path / "bundle", kind), bits)


def check(reader, bundle, *bits):
    pipeline = Pipeline(bundle, *bits)
    expected = pipeline.run(sample(bundle))
    payloads, answers = read(reader, bundle.directory, *bits)
    targets = {crossing.tensor: crossing.target for crossing in pipeline.crossings.values()}
    wanted = {
        (tensor, targets[tensor], row): payload
        for tensor, each in expected.payloads.items()
        for row, payload in enumerate(each)
        if payload
    }
    assert payloads == wanted
    exits = [-1] * len(answers) if expected.exits is None else expected.exits.tolist()
    assert [answers[row][0] for row in range(len(expected.logits))] == exits
    found = torch.tensor([answers[row][1] for row in range(len(expected.logits))])
    torch.testing.assert_close(found, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["manifest.json", "head.pt", "sample.device.safetensors"])
def test_damage_is_found(reader, tmp_path, name):
    folder = make_bundle(tmp_path / "bundle").directory
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-30 if name == "manifest.json" else len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    ran = subprocess.run([str(reader), str(folder)], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "changed" in ran.stderr


def test_what_the_example_does_not_know_is_named(reader, tmp_path):
    parts, _ = make_parts("sample")
    edges = [edge("head", "tail", cut=code_codec("tiled_png", SHAPE, 4))]
    folder = tmp_path / "bundle"
    export_bundle(folder, parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    ran = subprocess.run([str(reader), str(folder)], capture_output=True, text=True)
    assert "knows the codecs float32, uniform and entropy, not tiled_image" in ran.stderr
    values = json.loads((folder / "manifest.json").read_text())
    values = {key: value for key, value in values.items() if key != "digest"} | {"schema": 6}
    (folder / "manifest.json").write_bytes(dump({**values, "digest": digest(values)}))
    ran = subprocess.run([str(reader), str(folder)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "this example reads schema 5\n")
