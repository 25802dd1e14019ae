"""Bundles that come from others: nothing global is touched, nothing grows, and only documented errors are raised."""

import ast
import contextlib
import dataclasses
import io
import os
import random
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageFile
from torch import nn

from cleave import deployment
from cleave.deployment import (
    BundleError,
    CodecError,
    Edge,
    EntropyCodec,
    FileEntry,
    FloatCodec,
    ImageInput,
    Manifest,
    Message,
    OutputSpec,
    Part,
    PartitionSpec,
    Pipeline,
    Route,
    Side,
    SparseCodec,
    TensorInput,
    TensorSpec,
    Transfer,
    UniformCodec,
    ZstdCodec,
    export_bundle,
    load_bundle,
    load_torchscript,
    open_image,
    read_manifest,
    unpack_bits,
)
from cleave.deployment.bundle.edges import Signature
from cleave.deployment.bundle.writing.private import without_paths
from cleave.deployment.codecs.image_codecs import JPEGCodec, PNGCodec, WebPCodec
from cleave.deployment.codecs.tiled_image import TiledImageCodec
from cleave.deployment.naming import did_you_mean

from .deployment_networks import INPUT, OUTPUTS, SHAPE, edge, images, make_bundle, make_parts, server_part
from .test_deployment_bundle import edit, replace_file, set_in

ROOM = Path(deployment.__file__).parent


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", "fixed").directory


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "bundle"))


# Nothing global is touched


PROCESS_WIDE = {
    *("catch_warnings", "simplefilter", "filterwarnings", "resetwarnings", "errstate", "seterr", "seterrcall", "umask"),
    *("manual_seed", "manual_seed_all", "seed", "set_rng_state", "set_default_dtype", "set_default_device", "chdir"),
    *("set_num_threads", "set_num_interop_threads", "use_deterministic_algorithms", "putenv", "setrecursionlimit"),
    *("set_grad_enabled", "set_float32_matmul_precision", "setlocale", "set_int_max_str_digits", "signal", "environ"),
    *("MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES"),
}


def test_no_file_of_the_room_names_what_is_process_wide():
    named = []
    for file in ROOM.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in PROCESS_WIDE:
                named.append((file.name, name))
    # Writing a bundle traces; only there Python's and PyTorch's warnings are held back.
    assert {file for file, _ in named} == {"torchscript.py"}
    assert {name for _, name in named} <= {"catch_warnings", "simplefilter", "filterwarnings"}


def state_of_the_process():
    return {
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "numpy errors": np.geterr(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(np.random.get_state()),  # noqa: NPY002
        "generator": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "recursion": sys.getrecursionlimit(),
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }


def use_everything(folder, file):
    """Load, test and run a bundle, read a picture, and code in every way."""
    bundle = load_bundle(folder)
    bundle.self_test()
    Pipeline(bundle, bits=3).run(images(3))
    Pipeline(bundle).run_files([file])
    with contextlib.suppress(ValueError):
        open_image(folder / "manifest.json")
    codes = torch.randint(0, 16, (2, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    sent = {"codes": codes, "low": torch.zeros(2), "high": torch.ones(2)}
    for codec in [
        SparseCodec((3, 4, 4), 4),
        ZstdCodec(UniformCodec((3, 4, 4), 4, 0.0, 1.0)),
        *(TiledImageCodec((3, 4, 4), 4, 0.0, 1.0, format=form) for form in ("png", "webp")),
        TiledImageCodec((3, 4, 4), 4, format="jpeg", quality=90),
    ]:
        payloads = codec.encode(sent)
        codec.decode(payloads)
        with contextlib.suppress(CodecError):
            codec.decode([payload[:-1] for payload in payloads])
    entropy = EntropyCodec((2, 2), (-1, 0), ((16384, 32768, 16384), (65000, 536)))
    entropy.decode(entropy.encode({"codes": torch.zeros(1, 2, 2, dtype=torch.int32)}))


@pytest.fixture
def file(tmp_path):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_running_a_bundle_leaves_the_process_as_it_was(folder, file, monkeypatch):
    use_everything(folder, file)  # what is imported on the way is imported now
    before = state_of_the_process()

    def refuse(*_, **__):
        raise AssertionError("warnings are the process's")

    monkeypatch.setattr(warnings.catch_warnings, "__enter__", refuse)
    monkeypatch.setattr(np.errstate, "__enter__", refuse)
    use_everything(folder, file)
    monkeypatch.undo()
    assert state_of_the_process() == before


def test_warnings_are_no_errors_after_threads_have_decoded(folder, file):
    found = []

    def work():
        try:
            for _ in range(3):
                use_everything(folder, file)
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    filters = list(warnings.filters)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not found
    assert warnings.filters == filters


def test_a_default_dtype_of_the_caller_changes_nothing(folder):
    expected = Pipeline(load_bundle(folder)).run(images())
    torch.set_default_dtype(torch.float64)
    try:
        bundle = load_bundle(folder)
        bundle.self_test()
        found = Pipeline(bundle).run(images())
        assert INPUT.normalize(images()).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.payloads == expected.payloads
    assert torch.equal(found.logits, expected.logits)


# Time and memory are bounded before they are spent


def many(count):
    return [f"name_{i:07}" for i in range(count)]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["partitions"][0].update(inputs=[tensor(name) for name in many(10_000)]),
        lambda v: v["partitions"][0].update(outputs=[tensor(name) for name in many(20_000)]),
        lambda v: v["partitions"].extend({**v["partitions"][1], "name": name, "file": name} for name in many(3_000)),
        lambda v: v["route"].extend({**v["route"][0], "producer": name} for name in many(5_000)),
        lambda v: v["route"][0].update(transfers=[{"tensor": name, "codec": None} for name in many(20_000)]),
        lambda v: v["outputs"][0].update(shape=many(20_000), class_names=[], kind="tensor"),
        lambda v: v["outputs"].extend({**v["outputs"][0], "name": name} for name in many(5_000)),
        lambda v: v["exits"].extend({"name": n, "partition": "head", "macs": 1, "accuracy": 0} for n in many(20_000)),
        lambda v: v["outputs"][0].update(class_names=many(150_000), shape=[150_000]),
        lambda v: v["outputs"][0].update(class_names=["same"] * 100_000, shape=[100_000]),
        lambda v: v["samples"].update(dict.fromkeys(many(20000), v["samples"]["device"])),
        lambda v: v["partitions"][0]["inputs"][0].update(shape=[1] * 100_000),
        lambda v: v["partitions"][0]["inputs"][0].update(name="x" * 1_000_000),
        lambda v: v["partitions"][1].update(placement="x" * 1_000_000),
        lambda v: v["route"][0].update(consumer="x" * 1_000_000),
        lambda v: v["outputs"][0].update(kind="x" * 1_000_000),
        lambda v: v.update(dict.fromkeys(many(20000), 0)),
        lambda v: v["config"].update(deep=nested(900)),
        lambda v: v["metrics"].update(deep=nested(100)),
    ],
)
@pytest.mark.timeout(30)
def test_a_manifest_of_too_much_is_refused_at_once(folder, change):
    edit(folder, change)
    with pytest.raises(BundleError) as caught:
        read_manifest(folder)
    assert len(str(caught.value)) < 5000


def tensor(name):
    return {"name": name, "dtype": "float32", "shape": [-1, 4]}


def nested(depth):
    values = []
    for _ in range(depth):
        values = [values]
    return values


@pytest.mark.timeout(30)
def test_the_largest_route_allowed_is_checked_at_once():
    count = 512
    parts = [Signature(f"p{i}", "device", (f"t{i}",), (f"t{i + 1}",)) for i in range(count)]
    edges = [Edge(f"p{i}", f"p{i + 1}", (Transfer(f"t{i + 1}"),)) for i in range(count - 1)]
    route = Route(tuple(reversed(parts)), tuple(edges), "t0", (f"t{count}",))
    assert route.order == tuple(f"p{i}" for i in range(count))
    assert route.after("p0") == set(route.order[1:])
    cyclic = [*edges, Edge(f"p{count - 1}", "p0", (Transfer(f"t{count}"),))]
    with pytest.raises(BundleError, match="the route has a cycle: p0 > p1 > "):
        Route(tuple(parts), tuple(cyclic), "t0", (f"t{count}",))


def test_partitions_that_may_run_in_either_order_run_as_they_are_listed():
    def part(name, takes, gives):
        return Signature(name, "device", takes, gives)

    parts = (
        part("c", ("b",), ("out",)),
        part("b2", ("x",), ("o2",)),
        part("a", ("x",), ("a",)),
        part("b", ("a",), ("b",)),
    )
    edges = (Edge("a", "b", (Transfer("a"),)), Edge("b", "c", (Transfer("b"),)))
    assert Route(parts, edges, "x", ("out", "o2")).order == ("b2", "a", "b", "c")


@pytest.mark.timeout(30)
def test_a_hint_for_a_long_name_among_many_is_none():
    assert did_you_mean("x" * 100_000, many(100_000)) == ""


def test_a_file_of_another_length_is_not_read(folder, monkeypatch):
    with (folder / "head.pt").open("r+b") as file:
        file.truncate(4 * 2**30 - 1)

    def refuse(*_):
        raise AssertionError("it was read")

    monkeypatch.setattr("cleave.deployment.bundle.files.os.fdopen", reading(refuse))
    with pytest.raises(BundleError, match=r"head.pt has 4294967295 bytes, the manifest says"):
        load_bundle(folder)


def reading(refuse):
    """``os.fdopen`` whose large files cannot be read."""

    def opened(descriptor, mode):
        file = open(descriptor, mode)  # noqa: PTH123, SIM115
        if os.fstat(descriptor).st_size > 2**30:
            file = contextlib.closing(type("File", (), {"read": refuse, "close": file.close})())
        return file

    return opened


def archive(original, change):
    """A TorchScript file with some of its members changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(buffer, "w") as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), member.compress_type)
        change(target, source.infolist()[0].filename.split("/")[0])
    return buffer.getvalue()


ZEROS = bytes(80 * 2**20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, top: z.writestr(f"{top}/data/99", ZEROS[:4096], zipfile.ZIP_DEFLATED), "compresses .*data/99"),
        (lambda z, top: z.writestr(f"{top}/constants/99", ZEROS, zipfile.ZIP_DEFLATED), "compresses .*constants/99"),
        (lambda z, top: z.writestr(f"{top}/code/bomb.py", ZEROS, zipfile.ZIP_DEFLATED), "bytes of code, more than"),
        (lambda z, top: z.writestr(f"{top}/code/bomb.py", ZEROS[:99], zipfile.ZIP_BZIP2), "compresses .*bomb.py"),
        (lambda z, top: z.writestr("code/bomb.py", ZEROS[:4096], zipfile.ZIP_DEFLATED), "compresses 'code/bomb.py'"),
    ],
)
def test_a_zip_bomb_is_refused_before_it_is_unpacked(folder, change, message, monkeypatch):
    replace_file(folder, "head.pt", archive(folder / "head.pt", change))
    monkeypatch.setattr("zipfile.ZipFile.testzip", None)
    with pytest.raises(BundleError, match=f"partition head .*{message}"):
        load_bundle(folder)


def test_members_that_claim_more_than_the_file_has_are_refused(folder):
    content = bytearray((folder / "head.pt").read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        stored = [item for item in source.infolist() if item.compress_type == zipfile.ZIP_STORED and item.file_size]
    at = content.rfind(stored[0].filename.encode()) - 46  # its entry in the central directory
    content[at + 20 : at + 28] = (2**31 - 1).to_bytes(4, "little") * 2
    replace_file(folder, "head.pt", bytes(content))
    with pytest.raises(BundleError, match="claims to hold .* bytes, more than itself"):
        load_bundle(folder)


def test_a_changed_byte_of_a_weight_is_found_where_the_manifest_fits(folder):
    content = bytearray((folder / "tail.pt").read_bytes())
    weight = load_bundle(folder).partitions["tail"].module.state_dict()["layers.0.weight"]
    at = content.index(weight.numpy().tobytes())
    content[at] ^= 1
    replace_file(folder, "tail.pt", bytes(content))
    with pytest.raises(BundleError, match="partition tail .*damaged"):
        load_bundle(folder)


def test_a_sample_whose_header_claims_too_much_is_refused(folder):
    content = (folder / "sample.device.safetensors").read_bytes()
    replace_file(folder, "sample.device.safetensors", (50 * 2**20).to_bytes(8, "little") + content[8:])
    with pytest.raises(BundleError, match=r"sample\.device\.safetensors .* header claims 52428800 bytes"):
        load_bundle(folder)


# Only documented errors


@pytest.mark.parametrize(
    "settings",
    [
        {"color_mode": ["L"]},
        {"color_mode": {}},
        {"color_mode": None},
        {"interpolation": ["box"]},
        {"interpolation": 1},
        {"mean": "3"},
        {"mean": ["0.5", "0.4", "0.3"]},
        {"mean": [True, 0.4, 0.3]},
        {"mean": {"0.1": 1, "0.2": 1, "0.3": 1}},
        {"mean": [10**400, 0.4, 0.3]},
        {"mean": 3},
        {"std": "123"},
        {"std": [[1], [1], [1]]},
        {"std": None},
        {"height": "8"},
        {"height": 8.0},
        {"width": True},
        {"width": 10**400},
        {"resize": [10]},
        {"resize": 10**400},
    ],
)
def test_an_image_input_of_wrong_types_is_refused(folder, settings):
    with pytest.raises(ValueError, match=f"^(the )?{next(iter(settings))}|^mean and std"):
        ImageInput(**{**INPUT.to_dict(), **settings})
    edit(folder, lambda values: values["input"].update(settings))
    with pytest.raises(BundleError, match=f"{next(iter(settings))}|no spelling by RFC 8785"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": "12"},
        {"shape": [True]},
        {"shape": [2.0]},
        {"shape": [2**20, 2**20]},
        {"shape": [1] * 99},
        {"dtype": ["uint8"]},
        {"dtype": None},
        {"name": ["x"]},
        {"name": ""},
    ],
)
def test_a_tensor_input_of_wrong_types_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TensorInput(**{"shape": (2,), "dtype": "uint8", "name": "x", **settings})


@pytest.mark.parametrize(
    "build",
    [
        lambda: UniformCodec(SHAPE, 4, -(10**400), 1),
        lambda: UniformCodec(SHAPE, 4, 0, 10**400),
        lambda: UniformCodec(SHAPE, 4, 0.0, 1e39),
        lambda: UniformCodec(SHAPE, 4, "0", "1"),
        lambda: UniformCodec(SHAPE, "4", 0, 1),
        lambda: UniformCodec(SHAPE, [4], 0, 1),
        lambda: UniformCodec([1] * 99, 4, 0, 1),
        lambda: UniformCodec([[4]], 4, 0, 1),
        lambda: FloatCodec([10**400]),
        lambda: EntropyCodec((1, 1), (0,), ((65536,),), axis=0.0),
        lambda: EntropyCodec((1, 1), (0,), ((65536,),), axis=[0]),
        lambda: EntropyCodec((1, 1), (0,), (65536,)),
        lambda: EntropyCodec((1, 1), "0", ((65536,),)),
        lambda: TiledImageCodec(SHAPE, 4, format=["png"]),
        lambda: TiledImageCodec(SHAPE, 4, format="webp", quality="9"),
        lambda: TiledImageCodec(SHAPE, 4, format="jpeg", quality=10**400),
        lambda: ZstdCodec(7),
        lambda: ZstdCodec(FloatCodec(SHAPE), level=[1]),
        lambda: deployment.codec_from_dict({"kind": ["zstd"]}),
        lambda: deployment.codec_from_dict({"kind": "float32", 1: 2}),
    ],
)
def test_a_codec_of_wrong_types_is_refused(build):
    with pytest.raises(CodecError):
        build()


SENT = {"codes": torch.arange(48).view(1, 3, 4, 4) % 16, "low": torch.zeros(1), "high": torch.ones(1)}
CODECS = [
    UniformCodec((3, 4, 4), 4),
    UniformCodec((3, 4, 4), 5, 0.0, 1.0),
    SparseCodec((3, 4, 4), 4),
    ZstdCodec(SparseCodec((3, 4, 4), 4, 0.0, 1.0)),
    *(TiledImageCodec((3, 4, 4), 4, format=form) for form in ("png", "webp")),
    TiledImageCodec((3, 4, 4), 4, format="jpeg", quality=100),
    EntropyCodec((3, 4, 4), (0, 0, 0), ((4096,) * 16,) * 3),
    FloatCodec((3, 4, 4)),
]


@pytest.mark.parametrize("codec", CODECS)
def test_payloads_may_be_any_bytes(codec):
    sent = {"z": SENT["codes"].float()} if isinstance(codec, FloatCodec) else SENT
    (payload,) = codec.encode(sent)
    expected = codec.decode([payload])
    for kind in (bytearray, memoryview):
        found = codec.decode([kind(payload)])
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for wrong in ("text", None, 3, [1, 2], torch.zeros(4), np.zeros(4, np.uint8)):
        with pytest.raises(CodecError, match="payload 0 must be bytes, got"):
            codec.decode([wrong])
    for wrong in (payload, None, 3, "text", iter([payload])):
        with pytest.raises(CodecError, match="payloads must be a list"):
            codec.decode(wrong)
    with pytest.raises(CodecError):
        codec.encode({name: [1, 2, 3] for name in sent})


def test_pictures_and_codes_may_be_any_bytes():
    image = torch.arange(192).view(3, 8, 8).to(torch.uint8)
    for codec in (
        JPEGCodec(image.shape, 50),
        WebPCodec(image.shape),
        WebPCodec(image.shape, 50),
        PNGCodec(image.shape),
    ):
        payload = codec.encode(image)
        for kind in (bytearray, memoryview):
            assert torch.equal(codec.decode(kind(payload)), codec.decode(payload))
        for wrong in ("text", None, [1]):
            with pytest.raises(CodecError, match="must be bytes"):
                codec.decode(wrong)
    assert unpack_bits(memoryview(b"\x12\xf0"), 3, 4).tolist() == [1, 2, 15]
    with pytest.raises(CodecError, match="must be bytes"):
        unpack_bits("12", 3, 4)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float16])
def test_codes_of_other_types_are_refused(dtype):
    with pytest.raises(CodecError, match="codes must be integers"):
        UniformCodec((2,), 4).encode(
            {"codes": torch.ones(1, 2).to(dtype), "low": torch.zeros(1), "high": torch.ones(1)}
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, 16])
def test_codes_of_any_integers_are_checked(dtype, wrong):
    codec, sent = UniformCodec((2,), 4), {"low": torch.zeros(1), "high": torch.ones(1)}
    assert codec.encode({"codes": torch.tensor([[3, 15]], dtype=dtype), **sent})[0][8:] == b"\x3f"
    if not (wrong < 0 and dtype == torch.uint8):
        with pytest.raises(CodecError, match="codes of 4 bits lie in 0..15"):
            codec.encode({"codes": torch.tensor([[3, wrong]], dtype=dtype), **sent})


@pytest.mark.parametrize(
    "wrong", [[], None, "images", np.zeros((1, 3, 8, 8), np.uint8), torch.tensor(3), {"images": 1}]
)
def test_a_pipeline_and_a_side_refuse_what_is_no_batch(folder, wrong):
    bundle = load_bundle(folder)
    with pytest.raises(BundleError, match=r"images, uint8 \[-1, 3, 8, 8\], got"):
        Pipeline(bundle).run(wrong)
    with pytest.raises(BundleError, match=r"images, uint8 \[-1, 3, 8, 8\], got"):
        Side(bundle, "device").run(wrong, request=0)
    with pytest.raises(BundleError):
        Pipeline(bundle).run(Message((0,), {"images": images(1)}))


@pytest.mark.parametrize(
    ("rows", "payloads"),
    [
        ((0, "1"), {}),
        ((0, None), {}),
        ((-1, 0), {}),
        ((0.0,), {}),
        ((True,), {}),
        (3, {}),
        ((1, 0), {}),
        ((0,), {"cut": b"abc"}),
        ((0,), {"cut": 3}),
        ((0,), {"cut": (b"a", b"b")}),
        ((0,), {"cut": []}),
    ],
)
def test_a_side_refuses_messages_of_wrong_types(folder, rows, payloads):
    side = Side(load_bundle(folder), "server")
    with pytest.raises(ValueError, match="rows must rise|payloads"):
        side.run(Message(rows, payloads), request=0)
    assert side.waiting == ()


@pytest.mark.parametrize("payload", [[images(2)], images(2)[0, 0, 0, 0], images(1), None])
def test_the_input_in_a_message_has_a_sample_for_each_row(folder, payload):
    with pytest.raises(BundleError, match="images must be a tensor of 2 samples"):
        Side(load_bundle(folder), "device").run(Message((0, 1), {"images": payload}), request=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parts_of_another_precision_are_refused_in_words(tmp_path, dtype):
    parts, edges = make_parts("float")
    for part in parts:
        part.module.to(dtype)
    with pytest.raises(BundleError, match="(computes in float32: call .float|dtype of cut must be one of)"):
        export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [TypeError("a"), IndexError("a"), KeyError("a"), AttributeError("a"), OSError("a")])
def test_a_module_that_raises_is_named_in_export(tmp_path, error):
    head = Part("head", "device", Raises(error), ("images",), ("cut",))
    with pytest.raises(BundleError, match="partition head cannot compute with images uint8"):
        export_bundle(
            tmp_path / "bundle", [head, server_part(("cut",))], [edge("head", "tail", cut=FloatCodec(SHAPE))],
            input=INPUT, outputs=OUTPUTS, images=images(),
        )  # fmt: skip


def test_export_refuses_images_and_names_of_wrong_types(tmp_path):
    parts, edges = make_parts("float")
    arguments = {"input": INPUT, "outputs": OUTPUTS}
    with pytest.raises(BundleError, match="images must be a tensor, got ndarray"):
        export_bundle(tmp_path / "bundle", parts, edges, images=images().numpy(), **arguments)
    parts[0] = dataclasses.replace(parts[0], inputs="images")
    with pytest.raises(BundleError, match="lists of names, got a text"):
        export_bundle(tmp_path / "bundle", parts, edges, images=images(), **arguments)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"PK" * 99, bytes(4096)])
def test_what_is_no_torchscript_is_refused(content):
    with pytest.raises(BundleError, match="the file .*"):
        load_torchscript(content)


@pytest.mark.parametrize("device", ["gpu", "", 3.5, None, [1]])
def test_a_device_that_torch_does_not_know_is_refused(folder, device):
    with pytest.raises(BundleError, match="device must be one that torch knows"):
        load_bundle(folder, device=device)


def test_a_partition_that_cannot_compute_says_so(folder):
    part = load_bundle(folder).partitions["tail"]
    part.spec = dataclasses.replace(
        part.spec, inputs=tuple(dataclasses.replace(s, shape=(-1,) * len(s.shape)) for s in part.spec.inputs)
    )
    sample = {**part_sample(folder), "cut.codes": torch.zeros(5, 9, 4, 4, dtype=torch.int32)}
    with pytest.raises(BundleError, match=r"partition tail cannot compute with cut.codes \[5, 9, 4, 4\]"):
        part(sample)


def part_sample(folder):
    bundle = load_bundle(folder)
    return {**bundle.manifest.route.settings, **bundle.samples["server"]}


# Autocast, samples, types, paths, the first call


MODES = [contextlib.nullcontext, torch.inference_mode, torch.no_grad]
KINDS = ["fixed", "sample", "float", "whole"]
# Each kind and each mode once in `make test`.
BY_TURNS = [
    pytest.param(kind, mode, marks=[pytest.mark.slow] * ((k - m) % 3 != 0))
    for k, kind in enumerate(KINDS)
    for m, mode in enumerate(MODES)
]


@pytest.mark.parametrize(("kind", "mode"), BY_TURNS)
def test_autocast_does_not_reach_into_a_bundle(tmp_path, kind, mode):
    bundle = make_bundle(tmp_path / "bundle", kind)
    expected = Pipeline(bundle).run(images())
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        loaded = load_bundle(tmp_path / "bundle")
        loaded.self_test()
        for each in (bundle, loaded):
            found = Pipeline(each).run(images())
            assert torch.equal(found.logits, expected.logits)
            assert found.payloads == expected.payloads
        assert torch.is_autocast_enabled("cpu")
        again = make_bundle(tmp_path / "again", kind)
    assert torch.equal(Pipeline(again).run(images()).logits, expected.logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind", ["fixed", "float"])
def test_autocast_on_a_gpu_does_not_reach_into_a_bundle(tmp_path, kind):
    make_bundle(tmp_path / "bundle", kind)
    bundle = load_bundle(tmp_path / "bundle", device="cuda")
    expected = Pipeline(bundle).run(images()).logits
    with torch.autocast("cuda", dtype=torch.float16), torch.inference_mode():
        assert torch.equal(Pipeline(bundle).run(images()).logits, expected)


def test_answers_can_be_trained_on(folder):
    logits = Pipeline(load_bundle(folder)).run(images()).logits
    (logits.requires_grad_() ** 2).sum().backward()
    assert torch.equal(logits.grad, 2 * logits)


def test_a_sample_without_samples_is_refused(folder):
    for place in ("device", "server"):
        sample = safetensors.torch.load_file(folder / f"sample.{place}.safetensors")
        empty = {name: tensor[:0].clone() for name, tensor in sample.items()}
        replace_file(folder, f"sample.{place}.safetensors", safetensors.torch.save(empty))
        with pytest.raises(BundleError, match=f"sample.{place}.safetensors holds no samples"):
            load_bundle(folder, placement=place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [s.update(shape=[5, *s["shape"][1:]]) for s in v["partitions"][0]["outputs"]], "begin with -1, the"),
        (set_in("partitions", 1, "outputs", 0, "shape", value=[5, 4]), "must begin with -1"),
        (set_in("partitions", 1, "outputs", 0, "shape", value=[]), "must begin with -1"),
        (set_in("partitions", 1, "outputs", 0, "shape", value=[-1, 0]), "positive whole numbers"),
        (set_in("partitions", 1, "outputs", 0, "shape", value=[-1, True]), "positive whole numbers"),
        (set_in("partitions", 1, "outputs", 0, "shape", value=[-1, 2**40]), "more than 4294967296 elements"),
        (set_in("partitions", 1, "outputs", 0, "name", value=""), "a name of 1 to 256 characters"),
        (set_in("partitions", 1, "outputs", 0, "name", value="\ud800"), "half a character|no Unicode|non-UTF-8"),
        (set_in("outputs", 0, "class_names", value=["a", "b", "a", "c"]), "'a' twice.*each class a name of its own"),
        (set_in("outputs", 0, "class_names", value=["a", "b", "", "c"]), "a name of 1 to 1024 characters"),
        (set_in("outputs", 0, "class_names", value="abcd"), "class_names has the wrong type"),
        (set_in("versions", value={"torch": 2.15}), "the version of torch must be a name"),
        (
            set_in("parity", value={"max_difference": "0", "codes_differing": 0, "batches": []}),
            "max_difference has the",
        ),
        (set_in("parity", value={"max_difference": 0, "codes_differing": 0, "batches": ["5"]}), "batches must be"),
        (set_in("parity", value={"max_difference": 0}), "parity lacks"),
        (set_in("partitions", 0, "macs", value=1.5), "macs has the wrong type"),
        (set_in("partitions", 0, "outputs", 0, "dtype", value="float32"), "must be|codes are int32"),
        (set_in("samples", "de vice", value={}), "lacks|must be a plain name"),
    ],
)
def test_types_and_shapes_that_nothing_could_use_are_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(BundleError, match=message):
        read_manifest(folder)


def test_the_python_objects_refuse_them_too():
    with pytest.raises(BundleError, match="'ant' twice"):
        OutputSpec("logits", "logits", (2,), ("ant", "ant"))
    with pytest.raises(BundleError, match="must be one of"):
        TensorSpec("x", ["uint8"], (-1,))
    with pytest.raises(BundleError, match="sha256"):
        FileEntry("x.pt", 3, 3)
    with pytest.raises(BundleError, match="bytes"):
        FileEntry("x.pt", "0" * 64, "3")
    with pytest.raises(BundleError):
        Manifest.from_dict([])
    with pytest.raises(BundleError):
        PartitionSpec.from_dict(None)


def test_the_manifest_holds_no_path_of_the_machine_that_wrote_it(tmp_path):
    config = {
        "base": {"ckpt_path": str(tmp_path / "teacher.ckpt"), "none": None, "rate": 0.5},
        "overrides": [f"base.ckpt_path={tmp_path}/teacher.ckpt", "split.at=layer2", f"root: '{Path.home()}/data'"],
        "cwd": str(Path.cwd()),
        "home": "~/runs/1",
        "windows": "C:\\Users\\ada\\best.ckpt",
        "exit": "layer1/logits",
        "page": "https://example.org/data/set",
        "log_dir": "logs/run",
    }
    bundle = make_bundle(
        tmp_path / "bundle", "fixed", config=config, metrics={"points": [{"checkpoint": str(tmp_path)}]}
    )
    text = (tmp_path / "bundle" / "manifest.json").read_text()
    for path in (tmp_path, tmp_path.parent, Path.home(), Path.cwd()):
        assert f"{path}/" not in text
        assert f'"{path}"' not in text
    kept = bundle.manifest.config
    assert kept["base"] == {"ckpt_path": "teacher.ckpt", "none": None, "rate": 0.5}
    assert kept["overrides"] == ["base.ckpt_path=teacher.ckpt", "split.at=layer2", "root: 'data'"]
    assert (kept["home"], kept["windows"]) == ("1", "best.ckpt")
    assert (kept["exit"], kept["page"], kept["log_dir"]) == (
        "layer1/logits",
        "https://example.org/data/set",
        "logs/run",
    )
    assert bundle.manifest.metrics["points"] == [{"checkpoint": tmp_path.name}]
    assert config["home"] == "~/runs/1"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/a/b/c.pt", "c.pt"),
        ("/a/b/", "b"),
        ("../../a/b", "b"),
        ("//server/share", "//server/share"),
        ("\\\\server\\share\\x", "x"),
        ("D:/a/b", "b"),
        ("file:///a/b", "b"),
        ("['/a/b', '/c/d']", "['b', 'd']"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("accuracy / loss", "accuracy / loss"),
        ("~codec.bits", "~codec.bits"),
        ("1/2", "1/2"),
        ("", ""),
    ],
)
def test_of_a_path_its_last_part_stays(text, kept):
    assert without_paths({"a": [text]}) == {"a": [kept]}


def test_partitions_have_run_before_the_first_request(folder, monkeypatch):
    calls = []
    run = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *a: calls.append([len(a[0])]) or run(self, *a))
    load_bundle(folder, warm_up=False)
    assert calls == []
    load_bundle(folder)
    assert len(calls) >= 6
    assert {rows for (rows,) in calls} == {1, 5}


@pytest.mark.slow
def test_the_first_request_takes_no_longer_than_later_ones(folder):
    code = f"""
import time, torch
from cleave.deployment import Pipeline, load_bundle
torch.set_num_threads(1)
pipeline = Pipeline(load_bundle({str(folder)!r}))
batch = pipeline.bundle.samples["device"]["images"][:1]
seconds = []
for _ in range(30):
    start = time.perf_counter()
    found = pipeline.run(batch)
    seconds.append(sum(found.part_seconds.values()))
print(seconds[0] / sorted(seconds[10:])[10])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert float(ran.stdout) < 10
