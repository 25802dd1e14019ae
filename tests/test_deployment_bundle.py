import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from cleave import deployment
from cleave.deployment import (
    BundleError,
    FileEntry,
    ParityError,
    load_bundle,
    load_torchscript,
    read_manifest,
    save_torchscript,
    write_manifest,
)
from cleave.deployment.bundle import manifest as manifest_room
from cleave.deployment.bundle.canonical_json import digest, dump

from .deployment_networks import CLASSES, INPUT, images, make_bundle

FILES = ["head.pt", "tail.pt", "sample.device.safetensors", "sample.server.safetensors"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle") / "bundle"
    make_bundle(directory, config={"seed": 0}, metrics={"accuracy": 0.97}, exits=())
    return directory


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def edit(folder, change, sign=True):
    """Change the manifest's values, with a digest that fits them unless told otherwise."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    if sign:
        with contextlib.suppress(ValueError):  # what RFC 8785 cannot spell has no digest
            values["digest"] = digest({key: value for key, value in values.items() if key != "digest"})
    path.write_bytes(dump(values))


# Damage


def test_a_sound_bundle_loads(folder):
    bundle = load_bundle(folder)
    assert bundle.class_names == CLASSES
    assert bundle.input == INPUT
    assert bundle.manifest.metrics == {"accuracy": 0.97}
    assert list(bundle.partitions) == ["head", "tail"]
    assert bundle.self_test().max_difference == 0
    assert load_bundle(str(folder)).manifest == bundle.manifest == read_manifest(folder)


@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.slow] * (part > 1)) for part in range(8)])
def test_any_changed_byte_of_the_manifest_is_found(folder, part):
    path = folder / "manifest.json"
    sound = path.read_bytes()
    generator = np.random.default_rng(part)
    for position in range(part, len(sound), 8):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << generator.integers(8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(BundleError):
            read_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[:-1],
        lambda b: b + b"\n",
        lambda b: b" " + b,
        lambda b: b.replace(b"  ", b" \t", 1),
        lambda b: b.replace(b'"route"', b'"\\u0072oute"', 1),
        lambda b: b.replace(b"0.97", b"0.970", 1),
        lambda b: b.replace(b"\n", b"\r\n"),
        lambda b: b"",
        lambda b: b"\xff" + b,
        lambda b: b"[" * 100_000,
        lambda b: b.replace(b"0.97", b"NaN", 1),
        lambda b: b.replace(b'"seed": 0', b'"seed": 0, "seed": 0', 1),
        lambda b: b"null\n",
        lambda b: b"[]\n",
    ],
)
def test_any_other_spelling_of_the_manifest_is_found(folder, change):
    path = folder / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BundleError, match=r"manifest"):
        read_manifest(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_of_any_file_is_found_before_it_is_read(folder, name, monkeypatch):
    loaded = []
    monkeypatch.setattr("cleave.deployment.bundle.loading.load_torchscript", lambda *_: loaded.append(1))
    sound = (folder / name).read_bytes()
    for position in (0, 1, len(sound) // 2, len(sound) - 1):
        damaged = bytearray(sound)
        damaged[position] ^= 1
        (folder / name).write_bytes(bytes(damaged))
        with pytest.raises(BundleError, match=f"{name} has changed"):
            load_bundle(folder)
    assert not loaded


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b""])
def test_another_length_is_found(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(BundleError, match=rf"{name} has \d+ bytes, the manifest says"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_symbolic_link_is_refused_wherever_it_leads(folder, name):
    inside = folder / "copy"
    (folder / name).rename(inside)
    for target in (inside, Path(shutil.copy(inside, folder.parent / "outside")), folder / "nothing"):
        (folder / name).symlink_to(target)
        with pytest.raises(BundleError, match=f"{name} is a symbolic link"):
            load_bundle(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_what_is_no_file_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleError, match=f"{name} is not a regular file"):
        load_bundle(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    with pytest.raises(BundleError, match=f"{name} is not a regular file"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../head.pt", "..", ".", "", "sub/head.pt", "sub\\head.pt", "C:head.pt", "head.pt\0", "hé.pt"],
)
def test_a_path_leading_outside_is_refused(folder, name):
    for change in (
        lambda values: values["partitions"][0].update(file=name),
        lambda values: values["samples"]["device"].update(file=name),
    ):
        edit(folder, change)
        with pytest.raises(BundleError, match="must be a plain name"):
            load_bundle(folder)


def test_what_is_no_bundle_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name, message in (
        ("absent", "is not a folder"),
        ("file", "is not a folder"),
        (".", "manifest.json is missing"),
    ):
        with pytest.raises(BundleError, match=message):
            load_bundle(tmp_path / name)


def test_files_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(manifest_room, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(BundleError, match=r"manifest.json has \d+ bytes, more than the 100 allowed"):
        read_manifest(folder)
    monkeypatch.undo()
    manifest = read_manifest(folder)
    with pytest.raises(BundleError, match="more than the 16777216 allowed"):
        write_manifest(folder, dataclasses.replace(manifest, config={"text": "x" * 2**24}))
    edit(folder, lambda values: values["samples"]["server"].update(bytes=2**40))
    with pytest.raises(BundleError, match="may have 1 to 4294967296 bytes"):
        read_manifest(folder)


# A manifest that contradicts itself, with a digest that fits


def set_in(*path, value):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


def remove(*path):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return change


def twice(*path):
    def change(values):
        for key in path:
            values = values[key]
        values.append(values[0])

    return change


def repeat_partition(**changes):
    def change(values):
        values["partitions"].append(values["partitions"][1] | changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("schema", value=99), r"has schema 99, written by .*: update Cleave, or export it with this version"),
        (set_in("schema", value=2), r"has schema 2, written by cleave .* and torch .*; .* reads 5: export it again"),
        (set_in("schema", value=True), "has schema True"),
        (remove("schema"), "has schema None"),
        (remove("route"), "the manifest lacks route"),
        (set_in("extra", value=1), "unknown keys extra"),
        (set_in("route", value="head"), "route has the wrong type, str"),
        (set_in("route", value=[]), "partition head takes cut.levels, which nothing gives"),
        (set_in("route", value=["head"]), "an edge must be an object, got str"),
        (set_in("route", 0, "gpu", value=1), "an edge has the unknown keys gpu"),
        (set_in("route", 0, "consumer", value="body"), "the unknown partition body; known are head, tail"),
        (set_in("route", 0, "consumer", value="head"), "the route has a cycle: head > head"),
        (set_in("route", 0, "producer", value="tail"), "the route has a cycle: tail > tail"),
        (set_in("route", 0, "transfers", value=[]), "the edge head > tail carries nothing"),
        (set_in("route", 0, "transfers", 0, "tensor", value="z"), "sends z.codes, z.low, z.high, which head does not"),
        (twice("route"), "the edge head > tail appears twice"),
        (twice("route", 0, "transfers"), "carries cut twice"),
        (set_in("route", 0, "transfers", 0, "codec", value=None), "sends cut, which head does not emit"),
        (set_in("route", 0, "transfers", 0, "codec", "kind", value="morse"), "unknown codec kind 'morse'"),
        (set_in("route", 0, "transfers", 0, "codec", "bits", value=1), "bits must be 2 to 16"),
        (
            set_in("route", 0, "transfers", 0, "codec", "shape", value=[4, 4]),
            "head emits cut.codes of shape .*its codec sends",
        ),
        (set_in("route", 0, "transfers", 0, "codec", value=7), "codec has the wrong type"),
        (set_in("route", 0, "transfers", 0, "codec", value={}), "a codec needs a kind"),
        (set_in("partitions", value=[]), "the route is empty"),
        (remove("partitions", 0, "sha256"), "a partition lacks sha256"),
        (set_in("partitions", 0, "gpu", value=1), "a partition has the unknown keys gpu"),
        (set_in("partitions", 0, "sha256", value="A" * 64), "must be 64 hexadecimal digits"),
        (set_in("partitions", 0, "bytes", value=0), "may have 1 to"),
        (set_in("partitions", 0, "bytes", value=True), "bytes has the wrong type"),
        (set_in("partitions", 0, "format", value="pickle"), "unknown format 'pickle'"),
        (set_in("partitions", 0, "params", value=-1), "negative"),
        (set_in("partitions", 0, "name", value="../x"), "must be a plain name"),
        (set_in("partitions", 0, "placement", value="../x"), "must be a plain name"),
        (set_in("partitions", 0, "placement", value="server"), "stays on server, where nothing is sent"),
        (set_in("partitions", 0, "placement", value="edge"), "each placement, edge, server, has one sample file"),
        (set_in("partitions", 0, "file", value="tail.pt"), "the file tail.pt appears twice"),
        (set_in("partitions", 0, "file", value="manifest.json"), "the file manifest.json appears twice"),
        (repeat_partition(), "the file tail.pt appears twice"),
        (repeat_partition(file="more.pt"), "the partition tail appears twice"),
        (repeat_partition(file="more.pt", name="end"), "logits is emitted by tail and by end"),
        (set_in("partitions", 0, value="head"), "a partition must be an object"),
        (set_in("partitions", 0, "inputs", 0, "dtype", value="complex64"), "the dtype of images must be one of"),
        (set_in("partitions", 0, "inputs", 0, "shape", value=[-1, 1, 8, 8]), "the input images of head must be"),
        (set_in("partitions", 0, "inputs", 0, "shape", value=[-2]), "the shape of images must be"),
        (set_in("partitions", 0, "inputs", 0, "name", value="cut.levels"), "head repeats cut.levels among its inputs"),
        (set_in("partitions", 1, "inputs", 0, "dtype", value="int64"), "the input cut.codes of tail must be .*int32"),
        (set_in("partitions", 1, "inputs", 3, "shape", value=[-1]), "the input cut.levels of tail must be"),
        (set_in("partitions", 1, "outputs", value=[]), "no partition emits the output logits"),
        (set_in("outputs", 0, "class_names", value=["a"]), "there are 1 class names"),
        (set_in("outputs", 0, "class_names", value=["a", 3]), "class_names has an entry of the wrong type: 3"),
        (set_in("outputs", 0, "class_names", value=[]), "at least one name"),
        (set_in("outputs", 0, "kind", value="logit"), "must be one of .*Did you mean 'logits'"),
        (set_in("outputs", 0, "name", value="scores"), "no partition emits the output scores"),
        (set_in("input", "height", value=0), "height must be"),
        (set_in("input", "size", value=1), "unknown image input keys"),
        (set_in("input", "kind", value="images"), "the kind of input must be one of .*Did you mean 'image'"),
        (set_in("exits", value=[1]), "an exit must be an object, got int"),
        (set_in("metrics", value=[]), "metrics has the wrong type"),
        (remove("samples", "device", "bytes"), "the sample of device lacks bytes"),
        (remove("samples", "device"), "each placement, device, server, has one sample file, got server"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_a_digest_that_does_not_fit_is_refused(folder):
    edit(folder, set_in("metrics", value={"accuracy": 1.0}), sign=False)
    with pytest.raises(BundleError, match="its own digest does not match"):
        read_manifest(folder)


# Files whose digests fit, but which are not what the manifest says


def replace_file(folder, name, content):
    (folder / name).write_bytes(content)
    entry = dataclasses.asdict(FileEntry.of(folder / name))
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()

    def change(values):
        for item in (*values["samples"].values(), *values["partitions"]):
            if item["file"] == name:
                item.update(entry)

    edit(folder, change)


def test_a_partition_that_is_no_torchscript_is_named(folder):
    replace_file(folder, "head.pt", b"not a zip file")
    with pytest.raises(BundleError, match="partition head cannot be loaded by torch"):
        load_bundle(folder)


def test_a_sample_that_is_no_safetensors_is_named(folder):
    replace_file(folder, "sample.device.safetensors", b"not a header")
    with pytest.raises(BundleError, match=r"sample\.device\.safetensors is not a safetensors file"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("server", lambda s: s.pop("logits"), r"must hold .*logits, it holds"),
        ("device", lambda s: s.update(more=s["images"].clone()), "it holds .*more"),
        ("server", lambda s: s.update(images=images()), "it holds .*images"),
        ("device", lambda s: s.update(images=s["images"].float()), "images must be uint8"),
        ("device", lambda s: s.update(images=s["images"][:3].clone()), "must hold as many samples in each tensor"),
    ],
)
def test_a_sample_that_lacks_something_is_named(folder, place, change, message):
    sample = safetensors.torch.load_file(folder / f"sample.{place}.safetensors")
    change(sample)
    replace_file(folder, f"sample.{place}.safetensors", safetensors.torch.save(sample))
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("place", "part", "name"),
    [("device", "head", "cut.codes"), ("server", "tail", "logits"), ("server", "tail", "cut.codes")],
)
def test_the_self_test_finds_a_partition_that_computes_something_else(folder, place, part, name):
    sample = safetensors.torch.load_file(folder / f"sample.{place}.safetensors")
    sample[name] = sample[name].flip(0).contiguous()
    replace_file(folder, f"sample.{place}.safetensors", safetensors.torch.save(sample))
    differing = "logits" if part == "tail" else name
    with pytest.raises(ParityError, match=f"partition {part}: {differing} differs"):
        load_bundle(folder).self_test()
    with pytest.raises(ParityError):
        load_bundle(folder, placement=place).self_test()
    assert load_bundle(folder, placement="server" if place == "device" else "device").self_test().max_difference == 0


@pytest.mark.parametrize("kind", ["sample", "float", "whole", "three"])
def test_the_self_test_passes_on_every_route(tmp_path, kind):
    parity = make_bundle(tmp_path / "bundle", kind).self_test()
    assert (parity.max_difference, parity.codes_differing) == (0.0, 0.0)


def save(module, inputs, path):
    save_torchscript(module.eval(), inputs, path)
    return path.read_bytes()


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images, levels):
        codes = (images[:, :1, :4, :4].expand(-1, 4, -1, -1) // 32).to(torch.int32)
        return self.change(codes, -levels.float().expand(len(images)) / 16, levels.float().expand(len(images)) / 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda *r: r[:2], "partition head returned 2 tensors instead of 3"),
        (lambda *r: r[0], "partition head returned 1 tensors instead of 3"),
        (lambda c, *r: (c.long(), *r), "partition head: cut.codes must be int32"),
        (
            lambda c, *r: (c[:, :2], *r),
            r"partition head: cut.codes must be int32 \[-1, 4, 4, 4\], got int32 \[5, 2, 4, 4\]",
        ),
    ],
)
def test_a_partition_that_returns_something_else_is_named(folder, change, message):
    content = save(Returns(change), [images(), torch.tensor(16)], folder.parent / "other.pt")
    replace_file(folder, "head.pt", content)
    head = load_bundle(folder).partitions["head"]
    with pytest.raises(BundleError, match=message):
        head({"images": images(), "cut.levels": torch.tensor(16)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"images": images()}, "partition head lacks its inputs cut.levels"),
        ({"images": images().float(), "cut.levels": torch.tensor(16)}, "images must be uint8"),
        ({"images": images(), "cut.levels": torch.tensor([16])}, r"cut.levels must be int64 \[\], got int64 \[1\]"),
        ({"images": images(), "cut.levels": torch.tensor(16.0)}, r"cut.levels must be int64 \[\], got float32 \[\]"),
    ],
)
def test_a_partition_fed_something_else_says_so(folder, tensors, message):
    with pytest.raises(BundleError, match=message):
        load_bundle(folder).partitions["head"](tensors)


# Where it runs


class MakesTensors(nn.Module):
    """Makes tensors on the way, on the device of its input."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 3), nn.Identity())
        self.stages = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x):
        x = self.part(x) + torch.zeros(1, 3, device=x.device) + torch.arange(3, device=x.device)
        return self.stages[0](x.to(x.device)) + torch.full((x.shape[0], 3), 2.0, device=x.device)


def test_tensors_made_on_the_way_follow_the_module_to_its_device(tmp_path):
    # The meta device stands for an accelerator: it refuses to compute with tensors that were left on the CPU.
    module = MakesTensors().eval()
    content = save(module, [torch.rand(2, 3)], tmp_path / "module.pt")
    result = load_torchscript(content, "meta")(torch.rand(4, 3, device="meta"))
    assert (result.device.type, tuple(result.shape)) == ("meta", (4, 3))
    loaded = load_torchscript(content)
    x = torch.rand(4, 3)
    assert torch.equal(loaded(x), module(x))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_bundle_written_on_the_cpu_runs_on_a_gpu(tmp_path):
    for kind in ("fixed", "sample", "float", "whole", "three"):
        make_bundle(tmp_path / kind, kind)
        bundle = load_bundle(tmp_path / kind, device="cuda")
        bundle.self_test()
        logits = deployment.Pipeline(bundle).run(images(7)).logits
        assert logits.device.type == "cpu"
        expected = deployment.Pipeline(load_bundle(tmp_path / kind)).run(images(7)).logits
        # One code on a rounding edge may fall to the other side there.
        torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.0)


def test_bundles_load_in_threads(folder):
    results = []
    threads = [threading.Thread(target=lambda: results.append(load_bundle(folder).class_names)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CLASSES] * 4


BLOCKED = [
    *("pytorch_lightning", "lightning", "timm", "torchvision", "hydra", "omegaconf", "wandb", "torchmetrics", "rich"),
    *("architectures", "losses", "datamodules", "lightning_modules", "planning", "scripts", "matplotlib", "sklearn"),
]
ALONE = f"""
import sys, json, warnings
warnings.simplefilter("error")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is not on this device")

sys.meta_path.insert(0, Block())
import deployment
for name in {BLOCKED!r}:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " could be imported")
bundle = deployment.load_bundle(sys.argv[1])
parity = bundle.self_test()
result = deployment.Pipeline(bundle).run_files(sys.argv[2:])
print(json.dumps({{
    "file": deployment.__file__,
    "parity": [parity.max_difference, parity.codes_differing],
    "logits": result.logits.numpy().tobytes().hex(),
    "payloads": [[payload.hex() for payload in edge] for edge in result.payloads.values()],
    "loaded": sorted(set({BLOCKED!r}) & set(sys.modules)),
    "baselines": [name for name in sys.modules if name.endswith(("image_codecs", "jpeg_scan", "tiled_image"))],
}}))
"""


@pytest.mark.parametrize("kind", [pytest.param("fixed", marks=pytest.mark.slow), "three"])
def test_a_bundle_runs_alone_on_a_device(tmp_path, kind):
    paths = []
    for i, size in enumerate([(20, 14), (8, 8), (9, 33)]):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    bundle = make_bundle(tmp_path / "bundle", kind)
    device = tmp_path / "device"
    shutil.copytree(
        Path(deployment.__file__).parent, device / "deployment", ignore=shutil.ignore_patterns("__pycache__")
    )
    (device / "run.py").write_text(textwrap.dedent(ALONE))
    command = [sys.executable, str(device / "run.py"), str(tmp_path / "bundle"), *paths]
    ran = subprocess.run(command, cwd=device, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    expected = deployment.Pipeline(bundle).run_files(paths)
    assert Path(found["file"]).is_relative_to(device)
    assert found["loaded"] == []
    assert found["baselines"] == []
    assert found["parity"] == [0.0, 0.0]
    assert found["payloads"] == [[payload.hex() for payload in edge] for edge in expected.payloads.values()]
    assert found["logits"] == expected.logits.numpy().tobytes().hex()
