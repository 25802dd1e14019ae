"""attack.py as a person runs it, on a checkpoint and on its bundle; what it writes and what it refuses."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.attack import attack
from cleave.scripts.export import export
from cleave.scripts.train import train

from .offline_run import offline_runs
from .training_helpers import PLAIN

BRIEF = ["attack.epochs=1", "attack.strengths=small", "targets.images=60", "white_box.steps=5", "resamples=300"]
BRIEF += ["attack.images=200", "pictures=3", "white_box.tv=[0,0.1]", "information.epochs=1", "information.batch=20"]
CHEAP = [
    "information.use=false",
    "attack.families=linear",
    "controls=[]",
    "white_box.use=false",
    "attack.images=60",
    "resamples=50",
]


@pytest.fixture(scope="module")
def split_file(teacher_file, tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("split")
    overrides = ["method=classification", f"base.ckpt_path={teacher_file}", "split.at=layer2", "bottleneck.channels=4"]
    overrides += ["data=digits", "data.image_size=8", "backbone=cifar", "backbone.name=resnet20", "test=false"]
    overrides += ["backbone.in_channels=1", "noise=gaussian", "noise.epsilon=null", "noise.sigma=0.5"]
    overrides += ["noise.bound=null", "trainer.max_epochs=1", "+trainer.limit_train_batches=6", "codec.bits=8"]
    train(compose_config("train", [*PLAIN, *overrides], folder))
    return folder / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def bundle(split_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    overrides = [f"ckpt_path={split_file}", "trainer=cpu", "+trainer.enable_progress_bar=false"]
    return export(compose_config("export", [*overrides, f"bundle={folder}/bundle"], folder))


def run(folder, *overrides):
    files = attack(compose_config("attack", list(overrides), folder))
    return json.loads(files["attack.json"].read_text()), files


@pytest.fixture(scope="module")
def reported(split_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{kind}_DIR", str(folder / "own"))
        more = ["logger=wandb", "logger.wandb.mode=offline", "attack.releases=[1,4]"]
        return run(folder, f"ckpt_path={split_file}", *BRIEF, *more)


def test_all_attackers_and_controls_are_reported(reported):
    report, files = reported
    attacks = report["attacks"]
    families = ["linear", "conv", "residual"]
    names = ["payload", "payload, trained without the noise", "logits", "raw input"]
    for name in names:
        assert [each["family"] for each in attacks if each["name"] == name and each["releases"] == 1] == families
    assert [each["family"] for each in attacks if each["releases"] == 4] == families
    assert any(each["name"].startswith("white box, total variation") for each in attacks)
    assert (report["draws"], report["at"], report["images"]["targets"]) == (True, "layer2", 60)
    assert {name for each in attacks for name in each["figures"]} == {"mse", "psnr", "ssim", "features", "explained"}
    (mean,) = (each for each in attacks if each["name"] == "mean image")
    assert mean["figures"]["mse"]["value"] == pytest.approx(report["mean_image_mse"])
    assert mean["figures"]["explained"]["value"] == pytest.approx(0)
    assert all(f["low"] <= f["value"] <= f["high"] for each in attacks for f in each["figures"].values())
    with files["attack.csv"].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["attack"] for row in rows] == [each["title"] for each in attacks]
    assert [row["mse"] for row in rows] == [repr(each["figures"]["mse"]["value"]) for each in attacks]


def test_the_headline_is_the_lowest_of_attackers_and_validation_images_choose(reported):
    report, _ = reported
    for headline in report["headlines"]:
        mine = [a for a in report["attacks"] if (a["role"], a["releases"]) == ("attacker", headline["releases"])]
        assert headline["mse"]["value"] == min(each["figures"]["mse"]["value"] for each in mine)
        assert headline["explained"]["value"] == pytest.approx(1 - headline["mse"]["value"] / report["mean_image_mse"])
        (chosen,) = (each for each in mine if each["chosen"])
        assert chosen["val_mse"] == min(each["val_mse"] for each in mine if each["val_mse"] is not None)
    assert [each["releases"] for each in report["headlines"]] == [1, 4]


def test_bounds_on_information_and_the_distance_correlation_with_its_spread_are_reported(reported):
    report, files = reported
    bounds = {each["key"]: each for each in report["information"]["bounds"]}
    assert list(bounds) == ["payload_bits", "infonce_bits"]
    above, below = bounds.values()
    assert (above["side"], above["bits"]["value"], above["ceiling"]) == (
        "at most",
        8 * 64,
        None,
    )  # 4·4·4 codes of a byte
    assert (below["side"], below["ceiling"]) == ("at least", pytest.approx(math.log2(20)))
    assert below["bits"]["value"] <= below["ceiling"] < above["bits"]["value"]
    found = report["information"]["distance_correlation"]
    assert (found["batches"], found["batch"]) == (3, 20)
    assert -1 <= found["value"] <= 1
    assert found["spread"] > 0
    (tracked,) = offline_runs(files["attack.json"].parent)
    assert tracked.summary["attack/payload_bits"] == 8 * 64
    assert tracked.summary["attack/infonce_bits"] == pytest.approx(below["bits"]["value"])


def test_the_picture_is_drawn_and_w_and_b_gets_everything(reported):
    report, files = reported
    (tracked,) = offline_runs(files["attack.json"].parent)
    assert (tracked.exit_codes, tracked.run.job_type) == ([0], "attack")
    assert tracked.summary["attack/explained"] == pytest.approx(report["headlines"][0]["explained"]["value"])
    assert tracked.summary["attack/mse_of_4_releases"] == pytest.approx(report["headlines"][1]["mse"]["value"])
    with Image.open(files["attack.png"]) as picture:
        assert picture.format == "PNG"
    for name in ("attack.json", "attack.csv"):
        assert tracked.artifacts[name].type == "report"
    assert len(tracked.series("attacks")) == 1


def test_a_bundle_is_attacked_as_its_checkpoint_within_the_intervals(split_file, bundle, tmp_path):
    more = ["attack.families=linear", "attack.strengths=large", "attack.releases=1", "controls=[logits]"]
    more += ["white_box.use=false", "attack.epochs=5", "attack.images=400", "pictures=2"]
    more += ["information.epochs=1"]
    ours, _ = run(tmp_path / "ours", f"ckpt_path={split_file}", *more)
    theirs, _ = run(tmp_path / "theirs", f"bundle={bundle}", *more)
    assert (theirs["draws"], theirs["at"], theirs["images"]) == (True, "layer2", ours["images"])
    bounds = [{each["key"]: each["bits"] for each in report["information"]["bounds"]} for report in (ours, theirs)]
    assert bounds[0]["payload_bits"] == bounds[1]["payload_bits"]  # a bundle's envelope is not counted
    for one, other in zip(ours["attacks"], theirs["attacks"], strict=True):
        assert one["title"] == other["title"]
        for name in ("mse", "explained"):
            first, second = one["figures"][name], other["figures"][name]
            assert first["low"] <= second["high"]
            assert second["low"] <= first["high"]


def test_few_images_and_a_judge_of_ones_own(split_file, teacher_file, tmp_path, capsys):
    more = [*CHEAP, f"judge.ckpt_path={teacher_file}", "judge.layer=layer1", "pictures=0", "attack.epochs=1"]
    report, files = run(tmp_path, f"ckpt_path={split_file}", *more)
    assert (report["images"]["train"], report["features"]) == (60, f"layer1 of {teacher_file}")
    assert "attack.png" not in files
    assert report["information"]["bounds"] == []
    assert report["information"]["distance_correlation"]["batch"] == 128
    told = capsys.readouterr().out
    assert "Lowest MSE behind one release" in told
    assert "Next: python scripts/export.py ckpt_path=" in told


def folder_of(root, *seeds):
    """An image folder whose splits train, val and test each hold pictures drawn from one seed."""
    for split, seed in zip(("train", "val", "test"), seeds, strict=True):
        generator = np.random.default_rng(seed)
        for number in range(8):
            place = root / split / f"{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / f"{number}.png")
    return root


def other(root):
    return ["data@attack.data=image_folder", f"attack.data.root={root}", "attack.data.augment=none"]


def test_the_adversary_may_have_another_data_set(split_file, tmp_path):
    root = folder_of(tmp_path / "noise", 1, 2, 3)
    report, _ = run(tmp_path / "out", f"ckpt_path={split_file}", *CHEAP, *other(root), "attack.epochs=1")
    assert (report["images"]["train"], report["images"]["val"], report["images"]["targets"]) == (8, 8, 359)


def test_data_that_overlap_the_targets_are_refused_or_left_out(split_file, tmp_path):
    from cleave.datamodules import Digits

    root = folder_of(tmp_path / "leak", 1, 2, 3)
    stolen = Digits(image_size=8).sample_batch("test", 10**6)["images"][:5]
    for number, image in enumerate(stolen):
        Image.fromarray(image[0].numpy()).save(root / f"train/0/stolen{number}.png")
    command = [f"ckpt_path={split_file}", *CHEAP, *other(root), "attack.epochs=1"]
    with pytest.raises(ValueError, match=r"data@attack.data: of 359 targets 5 are among the adversary's images"):
        run(tmp_path / "out", *command, "targets.images=null")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    report, _ = run(tmp_path / "out", *command, "targets.images=null", "targets.leave_out_seen=true")
    assert (report["images"]["targets"], report["images"]["left_out"]) == (354, 5)


def test_what_is_not_split_is_refused(teacher_file, tmp_path):
    with pytest.raises(ValueError, match=r"ckpt_path=.*: the network is not split.*split.at=LAYER"):
        run(tmp_path, f"ckpt_path={teacher_file}", *CHEAP)


def test_a_bundle_without_data_is_refused(bundle, tmp_path, monkeypatch):
    import cleave.scripts.assembly.attacking.victim as victim

    loaded = victim.load_bundle(bundle)
    object.__setattr__(loaded.manifest, "config", {})
    monkeypatch.setattr(victim, "load_bundle", lambda *_, **__: loaded)
    with pytest.raises(ValueError, match="does not say which images it was trained on.*data@attack.data=GROUP"):
        run(tmp_path, f"bundle={bundle}", *CHEAP)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "give one of ckpt_path=FILE and bundle=DIR, got ckpt_path=None and bundle=None"),
        (["ckpt_path=a", "bundle=b"], "give one of ckpt_path=FILE and bundle=DIR, got ckpt_path=a and bundle=b"),
        (["bundle=b", "white_box.use=true"], "white_box.use=true needs gradients.*bundle=b; give the checkpoint"),
        (["attack.families=[residul]"], "attack.families: .*Did you mean 'residual'"),
        (["attack.families=[]"], "attack.families is empty"),
        (["attack.strengths=huge"], "attack.strengths: there are small, medium, large, got 'huge'"),
        (["attack.images=0"], "attack.images must be a whole number of at least 1, got 0; null takes all"),
        (["targets.images=-1"], "targets.images must be a whole number of at least 1, got -1"),
        (["attack.releases=[0]"], "attack.releases must be whole numbers of at least 1, got 0"),
        (["attack.epochs=0"], "attack.epochs must be a whole number of at least 1, got 0"),
        (["attack.lr=0"], "attack.lr must be a positive number"),
        (["controls=[logit]"], "controls: .*Did you mean 'logits'"),
        (["white_box.tv=[-1]"], "white_box.tv must be numbers of at least 0, got -1"),
        (["white_box.steps=0"], "white_box.steps must be a whole number of at least 1, got 0"),
        (["white_box.use=3"], "white_box.use must be true, false or null, got 3"),
        (["judge.layer=layer1"], "judge.layer=layer1 is a layer of judge.ckpt_path"),
        (["information.batch=3"], "information.batch must be at least 4, .* got 3"),
        (["information.epochs=0"], "information.epochs must be a whole number of at least 1, got 0"),
        (["information.use=3"], "information.use must be true or false, got 3"),
        (["resamples=0"], "resamples must be a whole number of at least 1, got 0"),
        (["pictures=99"], "pictures must be a whole number from 0 to 32, got 99"),
        (["seed=-1"], "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_anything_is_loaded(overrides, told, tmp_path):
    given = any(each.startswith(("ckpt_path", "bundle")) for each in overrides) or not overrides
    with pytest.raises(ValueError, match=told):
        run(tmp_path, *([] if given else ["ckpt_path=nowhere.ckpt"]), *overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["at=layer1"], "at='layer1' is not sent by the device; it sends layer2"),
        (["data.root=somewhere"], "data.root=.*somewhere has no meaning"),
        (["data@attack.data=digits"], "data@attack.data.*makes the input"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused(overrides, told, split_file, tmp_path):
    if overrides[0].startswith("data@"):
        overrides = [*overrides, "attack.data.image_size=16"]
    with pytest.raises(ValueError, match=told):
        run(tmp_path, f"ckpt_path={split_file}", *CHEAP, *overrides)


def test_pixels_are_rounded_as_a_device_takes_them():
    from cleave.scripts.assembly.attacking.victim import as_bytes

    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_bytes(every.float() / 255), every)
    assert as_bytes(torch.tensor([-1.0, 2.0, 0.5])).tolist() == [0, 255, 128]
