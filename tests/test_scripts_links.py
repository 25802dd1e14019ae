"""Links from config to checkpoint, evaluation and bundle, on digits."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cleave.architectures import create_backbone, staged_network
from cleave.architectures.described import rebuild_host
from cleave.architectures.linking.described import Host
from cleave.datamodules import Digits
from cleave.deployment import ENVELOPE_BYTES, ImageInput, Pipeline, load_bundle
from cleave.lightning_modules import load_checkpoint
from cleave.lightning_modules.checkpoints.loading import file_sha256
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.linking import lending
from cleave.scripts.assembly.linking.lending import lend
from cleave.scripts.assembly.networks import build_network
from cleave.scripts.assembly.restoring import Restored, restore
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.train import train

QUIET = ["trainer=cpu", "+trainer.enable_progress_bar=false", "logger=none", "callbacks.progress=null"]
SHORT = ["trainer.max_epochs=1", "+trainer.limit_train_batches=3", "+trainer.limit_val_batches=1"]
SHORT += ["training.scheduler=null", "data.augment=none"]
DIGITS = ["data=digits", "data.image_size=8", "data.batch_size=16", "backbone.in_channels=1", "backbone.name=resnet20"]
LOCAL = ["links.local_blocks=[conv1,layer1,layer2,layer3]", "links.host_blocks=[features.2,features.5,features.9]"]
SAME = ["host.backbone.weights=w.th", "host.num_classes=10"]
PATH = ["experiment=links", "links.path=[1,1,2,3]", *LOCAL]


@pytest.fixture(scope="module")
def host_file(tmp_path_factory) -> Path:
    """A checkpoint of another architecture, on larger images and fewer channels a block."""
    quiet()
    folder = tmp_path_factory.mktemp("host")
    given = [*DIGITS, "data.image_size=12", "backbone.name=alexnet", "backbone.kwargs={width: 0.1}", *QUIET, *SHORT]
    train(compose_config("train", [*given, "test=false"], folder))
    return folder / "checkpoints/best.ckpt"


def run(folder: Path, *given: str) -> dict[str, float]:
    quiet()
    return train(compose_config("train", [*DIGITS, *QUIET, *SHORT, *given], folder))


def test_a_run_trains_links_and_its_checkpoint_needs_no_other_file(tmp_path, teacher_file, host_file):
    local, host = (tmp_path / name for name in ("local.ckpt", "host.ckpt"))
    local.write_bytes(teacher_file.read_bytes())
    host.write_bytes(host_file.read_bytes())
    given = [*PATH, f"base.ckpt_path={local}", f"host.ckpt_path={host}", "method.feature={_target_: torch.nn.MSELoss}"]
    few = "+trainer.limit_test_batches=4"
    metrics = run(tmp_path / "run", *given, few)
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    local.unlink()
    host.unlink()
    restored = restore(checkpoint)
    files = {"local": teacher_file, "host": host_file}
    state = {name: torch.load(file, weights_only=True)["state_dict"] for name, file in files.items()}
    for name, value in restored.network.state_dict().items():
        owner, _, own = name.partition(".")
        if owner in state:
            assert torch.equal(value, state[owner][f"network.{own}"]), name
    loaded = load_checkpoint(checkpoint).network.state_dict()
    assert loaded.keys() == restored.network.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in restored.network.state_dict().items())
    assert restored.network.input_shape == (1, 8, 8)
    assert restored.network.shapes["host/features.5/input"][1:] == (3, 3)  # cut on its own 12 pixels
    again = evaluate(compose_config("evaluate", [f"ckpt_path={checkpoint}", *QUIET[:2], few], tmp_path / "evaluate"))
    for name in ("test/acc", "test/loss", "test/payload_bytes"):
        assert again[name] == pytest.approx(metrics[name], abs=1e-6)
    up, down = (again[f"test/payload_bytes/{cut}"] for cut in restored.network.bottlenecks)
    assert up > 16 * 8 * 8 * 4
    assert down > 32 * 4 * 4 * 4
    assert again["test/payload_bytes"] == up + down


def test_a_run_over_a_host_is_resumed(tmp_path, teacher_file, host_file, capsys):
    given = [*PATH, f"base.ckpt_path={teacher_file}", "test=false"]
    run(tmp_path / "run", *given, f"host.ckpt_path={host_file}")
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(host_file.read_bytes())
    capsys.readouterr()
    more = [f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt", "trainer.max_epochs=2", "links.placements=[a,b,a]"]
    run(tmp_path / "on", *given, f"host.ckpt_path={moved}", *more)
    said = capsys.readouterr().out
    assert f"host.ckpt_path: {host_file} → {moved}: ignored, as the weights are the checkpoint's" in said
    assert "placements" not in said
    assert torch.load(tmp_path / "on/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.slow  # its parts have tests of their own
def test_losses_with_the_cache_are_those_without_and_paths_of_one_lout_share_it(tmp_path, teacher_file, host_file):
    files = [f"base.ckpt_path={teacher_file}", f"host.ckpt_path={host_file}", "test=false"]
    cache = ["feature_cache.use=true", f"feature_cache.directory={tmp_path}/cache"]
    cached = run(tmp_path / "cached", *PATH, *files, *cache)
    plain = run(tmp_path / "plain", *PATH, *files)
    for name in ("train/loss", "val/loss"):
        assert cached[name] == pytest.approx(plain[name], abs=1e-6), name
    assert len(list((tmp_path / "cache").iterdir())) == 1
    run(tmp_path / "skip", "experiment=links", "links.path=[1,null,null,3]", LOCAL[0], files[0], files[2], *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_codes_of_a_measured_range_take_the_place_of_floats(tmp_path, teacher_file, host_file):
    files = [f"base.ckpt_path={teacher_file}", f"host.ckpt_path={host_file}"]
    floats = run(tmp_path / "run", *PATH, *files, "+trainer.limit_test_batches=2")
    given = [f"ckpt_path={tmp_path}/run/checkpoints/best.ckpt", *QUIET[:2], "codec.bits=8"]
    codes = evaluate(compose_config("evaluate", [*given, "+trainer.limit_test_batches=2"], tmp_path / "evaluate"))
    envelopes = 2 * ENVELOPE_BYTES
    assert codes["test/payload_bytes"] - envelopes == (floats["test/payload_bytes"] - envelopes) / 4
    assert codes["test/acc"] == pytest.approx(floats["test/acc"], abs=0.1)
    record = json.loads((tmp_path / "evaluate/results.json").read_text())["path"]
    assert record["bytes_up"] == codes["test/payload_bytes/local/layer1"]
    assert record["bytes_down"] == codes["test/payload_bytes/host/features.9"]
    assert record["skipped"]["params"] > record["links"]["params"] > 0
    quick = [*given, f"bundle={tmp_path}/bundle", "+trainer.limit_test_batches=1"]
    placed = [*quick, "links.placements=[phone,cloud,phone]"]
    bundle = load_bundle(export(compose_config("export", placed, tmp_path / "export")))
    assert [part.name for part in bundle.manifest.partitions] == ["local_front", "host_middle", "local_back"]
    assert [part.placement for part in bundle.manifest.partitions] == ["phone", "cloud", "phone"]
    bundle.self_test()
    sent = Pipeline(bundle).run(Digits(image_size=8).sample_batch("test", 2)["images"]).payload_bytes
    assert sent == [round(codes["test/payload_bytes"])] * 2


def test_placements_of_links_mean_nothing_without_links(tmp_path, teacher_file):
    given = [f"ckpt_path={teacher_file}", *QUIET[:2], "links.placements=[phone,cloud,phone]"]
    with pytest.raises(ValueError, match="links.placements=.* has no meaning here"):
        export(compose_config("export", given, tmp_path / "export"))


def test_a_random_host_is_the_same_network_with_other_weights(tmp_path, teacher_file, host_file):
    given = [*PATH, f"base.ckpt_path={teacher_file}", f"host.ckpt_path={host_file}", "host.weights=random"]
    run(tmp_path / "run", *given, "test=false")
    restored = restore(tmp_path / "run/checkpoints/best.ckpt")
    trained = torch.load(host_file, weights_only=True)["state_dict"]
    own = {name[5:]: value for name, value in restored.network.state_dict().items() if name.startswith("host.")}
    assert own
    assert all(value.shape == trained[f"network.{name}"].shape for name, value in own.items())
    assert not any(torch.equal(own[name], trained[f"network.{name}"]) for name in own if name.endswith("weight"))


@pytest.mark.slow  # its parts have tests of their own
def test_what_stands_on_a_path_is_said_by_qualified_names(tmp_path, teacher_file, host_file):
    given = [*PATH, f"base.ckpt_path={teacher_file}", f"host.ckpt_path={host_file}", "links.host=none"]
    given += [
        "split.at=[local/layer1,host/features.9]",
        "split.form=insert",
        "bottleneck.width=4",
        "bottleneck.channels=3",
    ]
    given += ["codec.bits=4", "+codec.at={local/layer1: {bits: 2}}", "exits.at=[local/layer1]", "exits.head.convs=0"]
    given += ["method.train=[links,bottleneck,exits]"]
    loss = "{_target_: cleave.losses.JointExitLoss, weights: equal}"
    exits = f"{{_target_: cleave.lightning_modules.Term, of: [student/exits, labels], loss: {loss}}}"
    metrics = run(tmp_path / "run", *given, f"+method.extra_terms.exits={exits}")
    assert {"test/acc_exit/local/layer1", "test/payload_bytes/host/features.9"} <= metrics.keys()
    network = restore(tmp_path / "run/checkpoints/best.ckpt").network
    assert [network.bits(cut) for cut in network.bottlenecks] == [2, 4]
    assert not any(name.startswith("host.") for name in network.state_dict())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["links.path=[0,null,null,2]"], r"host.ckpt_path=.* has no meaning on links.path=\[0, None, None, 2\]"),
        (["links.path=null"], r"host.ckpt_path=.* has no meaning without links; give links.path"),
        (["host.ckpt_path=null"], r"links.path=\[1, 1, 2, 3\] leads over a host, but there is none"),
        (["host.weights=trained"], "host.weights must be pretrained or random, got 'trained'"),
        (["host.num_classes=10"], "host.num_classes=10 is for host.backbone"),
        (["+backbone@host.backbone=cifar"], "give either host.ckpt_path=.* or host.backbone, not both"),
        (["host.ckpt_path=null", "+backbone@host.backbone=cifar"], "frozen with random weights; give host.ckpt_path"),
        (
            ["host.ckpt_path=null", "+backbone@host.backbone=cifar", *SAME, "backbone.weights=w.th"],
            "local and host are one network",
        ),
        (["host.image_size=0"], "host.image_size must be a number of pixels or"),
        (["host.image_size=[8]"], "host.image_size must be a number of pixels or"),
    ],
)
def test_a_host_that_cannot_be_is_refused(given, told, tmp_path, host_file):
    cfg = compose_config("train", [*DIGITS, *PATH, f"host.ckpt_path={host_file}", *given], tmp_path)
    with pytest.raises(ValueError, match=told):
        lend(cfg, None)


def test_one_network_is_not_both(tmp_path, host_file):
    cfg = compose_config("train", [*DIGITS, *PATH, f"host.ckpt_path={host_file}"], tmp_path)
    with pytest.raises(ValueError, match=r"host.ckpt_path=.* and base.ckpt_path are one network"):
        lend(cfg, file_sha256(host_file))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["links.path=[1,2,1,3]"], r"links.path=\[1, 2, 1, 3\] has hin=2 behind hout=1"),
        (["links.path=[1,1,2,4]"], "links.path has lin=4, which is no local block; they are 0 conv1, 1 layer1"),
        (["links.style=thin"], "links.style must be one of full, reduced"),
        (["links.host=some"], "links.host must be used or none, got 'some'"),
        (["exits.count=9"], "cannot be spread"),
        (["exits.at=[layer1]"], "'layer1' must say whose layer it is"),
    ],
)
def test_a_path_that_cannot_be_is_refused(given, told, tmp_path):
    cfg = compose_config("train", [*DIGITS, *PATH, *given], tmp_path)
    local = create_backbone("cifar", "resnet20", 10, in_channels=1)
    host = create_backbone("cifar", "alexnet", 10, kwargs={"width": 0.1})
    lent = Host(host.network, torch.randn(2, 3, 12, 12))
    with pytest.raises(ValueError, match=told):
        build_network(cfg, local.network, ImageInput(8, 8, "L", (0.5,), (0.5,)), (), lent)


def test_a_local_network_without_weights_is_refused(tmp_path, host_file):
    given = [*PATH, f"host.ckpt_path={host_file}", "method.distillation=null"]
    with pytest.raises(ValueError, match="the local would stay frozen with random weights; give base.ckpt_path"):
        run(tmp_path, *given)


def test_the_trust_check_covers_host_and_links_and_no_path_lends_its_blocks(tmp_path, teacher_file, host_file):
    run(tmp_path / "run", *PATH, f"base.ckpt_path={teacher_file}", f"host.ckpt_path={host_file}", "test=false")
    checkpoint = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    for group, key in (("host", "backbone"), ("links", "style")):
        config = copy.deepcopy(checkpoint)
        config["cleave"]["config"][group][key] = {"_target_": "pathlib.Path.cwd"}
        torch.save(config, tmp_path / "harm.ckpt")
        for rebuild in (restore, load_checkpoint):
            with pytest.raises(ValueError, match=r"names pathlib\.Path\.cwd"):
                rebuild(tmp_path / "harm.ckpt")
    for key in ("base", "host"):
        files = [f"base.ckpt_path={teacher_file}", f"host.ckpt_path={host_file}"]
        with pytest.raises(ValueError, match=rf"{key}.ckpt_path=.* is a path of two networks"):
            run(tmp_path / "twice", *PATH, *files, f"{key}.ckpt_path={tmp_path}/run/checkpoints/best.ckpt")
    harmful = torch.load(host_file, weights_only=True)
    harmful["cleave"]["config"]["backbone"]["source"] = {"_target_": "pathlib.Path.cwd"}
    torch.save(harmful, tmp_path / "host.ckpt")
    with pytest.raises(ValueError, match=r"names pathlib\.Path\.cwd.* add host\.trust_checkpoint=true"):
        run(tmp_path / "b", *PATH, f"base.ckpt_path={teacher_file}", f"host.ckpt_path={tmp_path}/host.ckpt")


def test_a_host_of_one_image_size_keeps_that_of_its_training(tmp_path, monkeypatch):
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
    group = {"_target_": "cleave.architectures.backbones.create_backbone", "source": "timm"}
    group |= {"name": "vit_tiny_patch16_224", "pretrained": False, "weights": None, "kwargs": kwargs}
    trained = create_backbone("timm", group["name"], 5, image_size=(16, 16), kwargs=kwargs)
    network, image_input = staged_network(trained.network, torch.zeros(1, 3, 16, 16)), trained.input
    names = list("abcde")
    restored = Restored(OmegaConf.create({"backbone": group}), network, image_input, names, "", False)
    monkeypatch.setattr(lending, "restore", lambda *_, **__: restored)
    given = [*PATH, "links.host_blocks=[blocks.0,blocks.1]", "links.path=[1,1,1,3]", "host.ckpt_path=x.ckpt"]
    lent = lend(compose_config("train", given, tmp_path), None)
    assert torch.equal(lent.host.network.pos_embed, trained.network.pos_embed)
    assert rebuild_host({"host": lent.config}).network.pos_embed.shape == trained.network.pos_embed.shape
    other = compose_config("train", [*DIGITS, *given, "host.image_size=20"], tmp_path)
    local = create_backbone("cifar", "resnet20", 10, in_channels=1).network
    with pytest.raises(ValueError, match="host network cannot be cut .* images of 20×20: .*host.image_size"):
        build_network(other, local, ImageInput(8, 8, "L", (0.5,), (0.5,)), (), lend(other, None).host)
