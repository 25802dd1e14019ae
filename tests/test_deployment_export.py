import copy
import dataclasses
import json
import os
import stat

import pytest
import safetensors.torch
import torch
from torch import nn

from cleave.deployment import (
    BundleError,
    Edge,
    FloatCodec,
    OutputSpec,
    ParityError,
    Part,
    Pipeline,
    Transfer,
    UniformCodec,
    check_target,
    export_bundle,
    load_bundle,
    save_torchscript,
)
from cleave.deployment.bundle.writing import export, folder

from .deployment_networks import (
    CLASSES,
    DELIVERS,
    INPUT,
    OUTPUTS,
    SENDS,
    SHAPE,
    FixedDevice,
    SampleDevice,
    Server,
    Whole,
    codecs_of,
    device_part,
    edge,
    images,
    make_bundle,
    make_parts,
    server_part,
)

KINDS = ["fixed", "sample", "float", "whole", "three"]


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def export_device(directory, device, codec=None, **settings):
    codec = codec or UniformCodec(SHAPE, 4, -1.0, 1.0)
    arguments = {"input": INPUT, "outputs": OUTPUTS, "images": images(), **settings}
    return export_bundle(
        directory, [device_part(device), server_part()], [edge("head", "tail", cut=codec)], **arguments
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_route_computes_what_its_modules_compute(tmp_path, kind):
    bundle = make_bundle(tmp_path / "bundle", kind)
    parts, edges = make_parts(kind)
    codecs = codecs_of(edges)
    for count in (1, 2, 7):
        batch = images(count, seed=count)
        received = [batch]
        for index, part in enumerate(parts):
            settings = list(codecs[index].settings.values()) if index < len(codecs) else []
            with torch.no_grad():
                result = part.module.eval()(*received, *settings)
            received = [*result, *settings] if isinstance(result, tuple) else [result]
        assert torch.equal(Pipeline(bundle).run(batch).logits, result)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_describes_itself(tmp_path, kind):
    manifest = make_bundle(tmp_path / "bundle", kind, config={"seed": 0, 1: "x"}, metrics={"val/acc": 0.5}).manifest
    parts, edges = make_parts(kind)
    assert manifest.route.order == tuple(part.name for part in parts)
    assert manifest.edges == manifest.route.edges == tuple(edges)
    assert (manifest.input, manifest.outputs, manifest.class_names) == (INPUT, OUTPUTS, CLASSES)
    assert manifest.config == {"seed": 0, "1": "x"}
    assert manifest.metrics == {"val/acc": 0.5}
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.parity == {"max_difference": 0.0, "codes_differing": 0.0, "batches": [5, 1]}
    for part, spec in zip(parts, manifest.partitions, strict=True):
        assert (spec.name, spec.placement, spec.macs) == (part.name, part.placement, part.macs)
        assert [s.name for s in spec.inputs] == list(part.inputs)
        assert [s.name for s in spec.outputs] == list(part.outputs)
        assert spec.params == sum(p.numel() for p in part.module.parameters())
    assert manifest.partitions[0].inputs[0].shape == (-1, *INPUT.shape)
    assert manifest.partitions[-1].outputs[0].shape == (-1, len(CLASSES))
    files = {f"{p.name}.pt" for p in parts} | {f"sample.{p.placement}.safetensors" for p in parts} | {"manifest.json"}
    assert set(content(tmp_path / "bundle")) == files


def test_the_sample_batch_holds_the_expected_outputs(tmp_path):
    make_bundle(tmp_path / "bundle")
    device, server = (
        safetensors.torch.load_file(tmp_path / "bundle" / f"sample.{place}.safetensors")
        for place in ("device", "server")
    )
    parts, _ = make_parts("fixed")
    codes, low, high = parts[0].module.eval()(images(), torch.tensor(16))
    assert set(device) == {"images", *SENDS}
    assert set(server) == {*SENDS, "logits"}  # no images
    assert torch.equal(device["images"], images())
    for name, tensor in zip(SENDS, (codes, low, high), strict=True):
        assert torch.equal(device[name], tensor)
        assert torch.equal(server[name], tensor)
    torch.testing.assert_close(server["logits"], parts[1].module.eval()(codes, low, high, torch.tensor(16)).detach())


def test_modules_are_left_as_they_were(tmp_path):
    parts, edges = make_parts("fixed")
    parts[0].module.train()
    before = [copy.deepcopy(part.module.state_dict()) for part in parts]
    export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    for part, state in zip(parts, before, strict=True):
        assert part.module.training
        assert all(parameter.requires_grad for parameter in part.module.parameters())
        assert all(torch.equal(value, state[name]) for name, value in part.module.state_dict().items())


# The gate


class Batched(FixedDevice):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images, levels):
        codes, low, high = super().forward(images, levels)
        return self.change(self, images, codes), low, high


def baked_batch(module, images, codes):
    return codes.reshape(int(images.shape[0]), *SHAPE) + torch.zeros(len(images), 1, 1, 1, dtype=torch.int32)


def broadcast_batch(module, images, codes):
    # A tensor made by NumPy of the batch's length is a constant to the tracer.
    return codes + torch.tensor([0] * len(images), dtype=torch.int32).view(-1, 1, 1, 1)


def data_dependent(module, images, codes):
    return codes if images.float().mean() > 100 else codes.clamp_max(3)


def through_numpy(module, images, codes):
    return torch.from_numpy(codes.numpy() // 2)


def through_a_list(module, images, codes):
    return torch.tensor(codes.tolist(), dtype=torch.int32)


def random(module, images, codes):
    return (codes + torch.randint(0, 2, codes.shape)).clamp_max(15).to(torch.int32)


def neighbours(module, images, codes):
    return (codes + images[-1, 0, 0, 0].to(torch.int32) % 8).clamp_max(15)


def forgets_levels(module, images, codes):
    return codes.clamp_min(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (baked_batch, "head with a batch of 1 at 4 bits does not run once it is traced"),
        (broadcast_batch, "head with a batch of 1"),
        (data_dependent, r"steers by the values of its input.*images\.float\(\)\.mean\(\) > 100"),
        (through_numpy, "head cannot be traced: .*NumPy"),
        (through_a_list, "head cannot be traced: .*Python list"),
        (random, r"head with a batch of 5 at 4 bits: cut.codes differs in \d+\.\d+% of the codes"),
        (neighbours, "a sample's outputs depend on the others in its batch: partition head: cut.codes"),
        (forgets_levels, r"head with a batch of 5 at 2 bits emits what its codec cannot send: codes of 2 bits"),
    ],
)
def test_a_module_that_its_trace_does_not_hold_is_refused(tmp_path, change, message):
    torch.manual_seed(0)
    with pytest.raises(BundleError, match=message):
        export_device(tmp_path / "bundle", Batched(change))
    assert list(tmp_path.iterdir()) == []


def test_a_range_over_the_batch_is_refused(tmp_path):
    class BatchRange(SampleDevice):
        def forward(self, images, levels):
            codes, low, high = super().forward(images, levels)
            return codes, low.amin().expand_as(low), high.amax().expand_as(high)

    with pytest.raises(ParityError, match="depend on the others in its batch"):
        export_device(tmp_path / "bundle", BatchRange(), UniformCodec(SHAPE, 4))


def test_a_number_of_levels_frozen_in_the_module_is_refused(tmp_path):
    class Frozen(FixedDevice):
        def forward(self, images, levels):
            return super().forward(images, torch.tensor(int(levels)))

    with pytest.raises(ParityError, match=r"steers by the values of its input.*int\(levels\)"):
        export_device(tmp_path / "bundle", Frozen())


def test_another_range_than_the_codecs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the codec's fixed range is"):
        export_device(tmp_path / "bundle", FixedDevice(high=1.5))
    assert list(tmp_path.iterdir()) == []


class Shifted(nn.Module):
    """A saved partition that is not quite the module it is compared with."""

    def __init__(self, module, change):
        super().__init__()
        self.module, self.change = module, change

    def forward(self, *inputs):
        return self.change(self.module(*inputs))


def one_code(steps, count):
    def change(outputs):
        codes, low, high = outputs
        flat = codes.flatten().clone()
        flat[:count] += torch.where(flat[:count] > 7, -steps, steps).to(torch.int32)
        return flat.view_as(codes), low, high

    return change


@pytest.mark.parametrize(
    ("part", "change", "passes"),
    [
        ("head", one_code(0, 0), True),
        ("head", one_code(1, 1), False),  # 1 of 320 codes is more than 1e-4 of them
        ("head", lambda r: (r[0], r[1] + 1e-6, r[2]), True),
        ("head", lambda r: (r[0], r[1] + 1e-4, r[2]), False),
        ("head", lambda r: (r[0].long(), r[1], r[2]), False),
        ("tail", lambda y: y + 0.8e-5, True),
        ("tail", lambda y: y + 3e-5 + 3e-5 * y.abs(), False),
        ("tail", lambda y: y.double(), False),
        ("tail", lambda y: y / 0 * 0, False),
        ("tail", lambda y: y[:, :3], False),
    ],
)
def test_the_gate_measures_files_against_modules(tmp_path, monkeypatch, part, change, passes):
    save = export.save_torchscript

    def save_changed(module, inputs, path):
        save(Shifted(module, change).eval() if path.stem == part else module, inputs, path)

    monkeypatch.setattr(export, "save_torchscript", save_changed)
    if passes:
        parity = make_bundle(tmp_path / "bundle").manifest.parity
        assert 0 <= parity["max_difference"] < 1e-5
    else:
        with pytest.raises(ParityError, match=f"partition {part}"):
            make_bundle(tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []


def test_one_step_in_1e_4_of_the_codes_is_float_noise(tmp_path, monkeypatch):
    class Wide(FixedDevice):
        def forward(self, images, levels):
            codes, low, high = super().forward(images, levels)
            return codes.repeat(1, 40, 4, 4), low, high

    class Narrow(Server):
        def forward(self, codes, low, high, levels):
            return super().forward(codes[:, :4, :4, :4], low, high, levels)

    save = export.save_torchscript

    def export_wide(name, steps, share):
        def change(outputs):
            # On purpose in every batch alike: the last of each sample's codes, in some of its channels.
            codes = outputs[0].clone()
            count = int(share * codes[0].numel())
            codes[0, -1].view(-1)[:count] += torch.where(codes[0, -1].view(-1)[:count] > 1, -steps, steps).int()
            return (codes, *outputs[1:])

        def save_changed(module, inputs, path):
            save(Shifted(module, change).eval() if path.stem == "head" else module, inputs, path)

        monkeypatch.setattr(export, "save_torchscript", save_changed)
        parts = [device_part(Wide()), Part("tail", "server", Narrow(), DELIVERS, ("logits",))]
        codec = UniformCodec((160, 16, 16), 4, -1.0, 1.0)
        edges = [edge("head", "tail", cut=codec)]
        return export_bundle(tmp_path / name, parts, edges, input=INPUT, outputs=OUTPUTS, images=images())

    parity = export_wide("noise", steps=1, share=0.9e-4).manifest.parity
    assert 0 < parity["codes_differing"] <= 1e-4
    with pytest.raises(ParityError, match="by up to 2 steps"):
        export_wide("steps", steps=2, share=0.9e-4)
    with pytest.raises(ParityError, match="of the codes, by up to 1 steps"):
        export_wide("share", steps=1, share=3e-4)


# Arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": []}, "at least one partition"),
        ({"edges": []}, "partition head takes cut.levels, which nothing gives; given are images"),
        (
            {"edges": [edge("head", "tail", cut=FloatCodec(SHAPE))]},
            "sends cut, which head does not emit; it emits cut.c",
        ),
        ({"edges": [edge("head", "tail", cut=None)]}, "sends cut, which head does not emit"),
        (
            {"edges": [edge("head", "tial", cut=None)]},
            "unknown partition tial; known are head, tail. Did you mean 'tail'",
        ),
        ({"edges": [edge("head", "tail", cut=UniformCodec((4, 4, 5), 4, -1, 1))]}, r"must have shape \(B, 4, 4, 5\)"),
        ({"images": images()[:2]}, "at least 3"),
        ({"images": images()[0]}, "at least 3"),
        ({"images": images().float()}, r"images must be uint8 \[-1, 3, 8, 8\], got float32"),
        ({"images": images()[..., :7]}, r"images must be uint8 \[-1, 3, 8, 8\]"),
        ({"outputs": [OutputSpec("logits", "logits", (2,), ("a", "b"))]}, "the output logits is .*must be"),
        (
            {"outputs": [OutputSpec("logit", "logits", (4,), CLASSES)]},
            "emits the output logit; .*Did you mean 'logits'",
        ),
        ({"outputs": []}, "say what the network is for"),
        ({"config": {"path": object()}}, "must be plain finite JSON values"),
        ({"metrics": {"loss": float("nan")}}, "must be plain finite JSON values"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path, change, message):
    parts, edges = make_parts("fixed")
    arguments = {"parts": parts, "edges": edges, "input": INPUT, "outputs": OUTPUTS, "images": images()}
    with pytest.raises(ValueError, match=message):
        export_bundle(tmp_path / "bundle", **(arguments | change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"name": "../head"}, "must be a plain name"),
        (0, {"name": ""}, "must be a plain name"),
        (0, {"name": "TAIL"}, "a name of its own"),
        (0, {"placement": ""}, "needs a placement"),
        (0, {"placement": "a/b"}, "the placement of head, 'a/b' must be a plain name"),
        (0, {"placement": "SERVER"}, "each placement needs one spelling"),
        (0, {"placement": "server"}, "stays on server, where nothing is sent: the uniform codec of cut needs two"),
        (0, {"inputs": ("cut.levels",)}, "no partition takes the network's input images"),
        (0, {"inputs": ("images", "cut.level")}, "takes cut.level, which nothing gives; .*Did you mean 'cut.level"),
        (0, {"outputs": ("cut.codes", "cut.low", "high")}, "sends cut.high, which head does not emit"),
        (0, {"outputs": (*SENDS, "more")}, "emits more, which no edge, exit or output of the network takes"),
        (1, {"outputs": ("probabilities",)}, "no partition emits the output logits"),
        (1, {"outputs": ("logits", "cut.low")}, "cut.low is emitted by head and by tail"),
        (1, {"inputs": ("images",)}, "delivers cut.codes, .*, none of which tail takes; it takes images"),
        (1, {"inputs": (*DELIVERS, "images")}, "the input images is taken on device and on server"),
        (0, {"macs": -1}, "negative macs=-1"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, index, change, message):
    parts, edges = make_parts("fixed")
    parts[index] = dataclasses.replace(parts[index], **change)
    with pytest.raises(BundleError, match=message):
        export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda codes, low, high: codes, "must return the tensors cut.codes, cut.low, cut.high, it returned"),
        (lambda codes, low, high: (codes, low, high, high), "must return the tensors"),
        (lambda codes, low, high: (codes, low[0], high), "cut.low must begin with the batch of 5"),
        (lambda codes, low, high: (codes, low[:2], high), "cut.low must begin with the batch of 5"),
        (lambda codes, low, high: (codes.float(), low, high), "codes must be integers"),
        (lambda codes, low, high: (codes, low, {"high": high}), "must return the tensors"),
    ],
)
def test_a_module_that_returns_something_else_is_named(tmp_path, returned, message):
    class Other(FixedDevice):
        def forward(self, images, levels):
            return returned(*super().forward(images, levels))

    with pytest.raises(ValueError, match=message):
        export_device(tmp_path / "bundle", Other())
    assert list(tmp_path.iterdir()) == []


# The folder


def test_a_bundle_is_replaced_only_if_asked(tmp_path):
    target = tmp_path / "bundle"
    make_bundle(target)
    before = content(target)
    with pytest.raises(BundleError, match="overwrite=true"):
        make_bundle(target, "sample")
    with pytest.raises(BundleError, match="overwrite=true"):
        check_target(target)
    assert content(target) == before
    assert len(make_bundle(target, "whole", overwrite=True).partitions) == 1
    assert sorted(content(target)) == ["all.pt", "manifest.json", "sample.device.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_failing_export_leaves_the_old_bundle(tmp_path):
    make_bundle(tmp_path / "bundle")
    before = content(tmp_path / "bundle")
    with pytest.raises(ParityError):
        export_device(tmp_path / "bundle", Batched(data_dependent), overwrite=True)
    assert content(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    make_bundle(tmp_path / "bundle")
    before = content(tmp_path / "bundle")
    rename, calls = type(tmp_path).rename, []

    def fail_once(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail_once)
    with pytest.raises(BundleError, match="No space left on device"):
        make_bundle(tmp_path / "bundle", overwrite=True)
    assert content(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"file")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    make_bundle(tmp_path / "kept")
    (tmp_path / "kept" / "notes.txt").write_bytes(b"notes")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "best.pt").write_bytes(b"weights")
    cases = (
        ("weights", "holds best.pt"),
        ("photos", "holds cat.jpg"),
        ("kept", "holds notes.txt"),
        ("file", "is a file"),
        ("link", "symbolic link"),
    )
    for name, message in cases:
        for call in (make_bundle, check_target):
            with pytest.raises(BundleError, match=message):
                call(tmp_path / name, overwrite=True)
    assert content(tmp_path / "photos") == {"cat.jpg": b"cat"}
    assert len(content(tmp_path / "kept")) == 6


def test_an_empty_folder_is_taken_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    make_bundle(tmp_path / "empty")
    make_bundle(tmp_path / "a" / "b" / "bundle")
    assert load_bundle(tmp_path / "a" / "b" / "bundle").class_names == CLASSES
    os.umask(mask := os.umask(0))
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o777 & ~mask


def test_parents_that_were_made_go_again(tmp_path):
    with pytest.raises(ParityError):
        export_device(tmp_path / "a" / "b" / "bundle", Batched(data_dependent))
    check_target(tmp_path / "a" / "b" / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    ran = []

    class Watched(FixedDevice):
        def forward(self, images, levels):
            ran.append(1)
            return super().forward(images, levels)

    for call in (lambda path: export_device(path, Watched()), check_target):
        with pytest.raises(BundleError, match=r"cannot write to .*bundle: .*file is a file"):
            call(tmp_path / "file" / "bundle")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder.tempfile, "mkdtemp", refuse)
    for call in (lambda path: export_device(path, Watched()), check_target):
        with pytest.raises(BundleError, match=r"cannot write to .*bundle: Permission denied"):
            call(tmp_path / "bundle")
    assert not ran


def test_a_relative_target_is_written_below_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_bundle("bundle")
    (found,) = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["route"]
    assert (found["producer"], found["consumer"]) == ("head", "tail")


def test_a_module_in_training_mode_is_not_saved(tmp_path):
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    module[1].train()
    with pytest.raises(ValueError, match="in training mode are 1"):
        save_torchscript(module, [torch.zeros(2, 2)], tmp_path / "module.pt")


def test_a_whole_network_without_codes_is_exported(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", "whole")
    torch.manual_seed(1)
    module = Whole().eval()
    with torch.no_grad():
        assert torch.equal(Pipeline(bundle).run(images()).logits, module(images()))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([edge("a", "b", x=None), edge("b", "c", y=None), edge("c", "b", z=None)], "has a cycle: b > c > b"),
        ([edge("a", "b", x=None), edge("b", "c", y=None), edge("b", "b", w=None)], "has a cycle: b > b"),
        ([edge("a", "b", x=None), edge("a", "b", v=None), edge("b", "c", y=None)], "the edge a > b appears twice"),
        ([edge("a", "b", x=None), edge("b", "c", y=UniformCodec(SHAPE, 4))], "sends y.codes, .*does not emit"),
        (
            [edge("a", "b", x=FloatCodec(SHAPE)), edge("b", "c", y=None)],
            "b takes z, w, which nothing gives; given are",
        ),
    ],
)
def test_edges_that_cannot_be_walked_are_named(tmp_path, edges, message):
    parts = [
        Part("a", "device", nn.Identity(), ("images",), ("x", "v")),
        Part("b", "device", nn.Identity(), ("x", "z", "w"), ("y", "w")),
        Part("c", "device", nn.Identity(), ("y",), ("logits", "z")),
    ]
    with pytest.raises(BundleError, match=message):
        export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())


def test_an_edge_says_what_it_carries():
    with pytest.raises(BundleError, match="the edge a > b carries nothing"):
        Edge("a", "b", ())
    with pytest.raises(BundleError, match="the edge a > b carries x twice"):
        Edge("a", "b", (Transfer("x"), Transfer("x")))


def test_an_edge_to_another_placement_needs_a_codec(tmp_path):
    parts, _ = make_parts("float")
    with pytest.raises(BundleError, match="goes from device to server, so cut needs a codec"):
        export_bundle(
            tmp_path / "bundle", parts, [edge("head", "tail", cut=None)], input=INPUT, outputs=OUTPUTS, images=images()
        )
