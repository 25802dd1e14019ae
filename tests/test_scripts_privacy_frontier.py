"""privacy_frontier.py: a grid that is trained, tested and attacked, goes on in its folder, and names what is wanted."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image

from cleave.lightning_modules.signals import Stopped
from cleave.scripts import privacy_frontier as script
from cleave.scripts.assembly import fitting
from cleave.scripts.assembly.building import compose_config, instantiate_each
from cleave.scripts.assembly.frontier.folder import FrontierFolder, shared
from cleave.scripts.assembly.frontier.grid import grid_points, run_config
from cleave.scripts.assembly.frontier.measuring import rehearse
from cleave.scripts.assembly.given.resumed import overrides, run_of_another
from cleave.scripts.assembly.given.value_types import check_values
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import CONF, quiet
from cleave.scripts.attack import attack
from cleave.scripts.evaluate import evaluate
from cleave.scripts.privacy_frontier import check, frontier

from .offline_run import offline_runs
from .training_helpers import FailAt, KilledError

KEY = "method.extra_terms.nopeek.weight"
QUIET = ["trainer=cpu", "+trainer.enable_progress_bar=false", "logger=none", "callbacks.progress=null"]
SHORT = ["experiment=digits_hnd", "trainer.max_epochs=1", "+trainer.limit_train_batches=3", "data.augment=none"]
CHEAP = ["attack.families=[linear]", "attack.strengths=[small]", "attack.epochs=1", "attack.images=80"]
CHEAP += ["targets.images=40", "controls=[]", "white_box.use=false", "resamples=40", "pictures=3"]
CHEAP += ["information.batch=20", "information.epochs=1"]


def config(folder: Path, *given: str):
    quiet()
    return compose_config("privacy_frontier", [*SHORT, *QUIET, *CHEAP, *given], folder)


@pytest.fixture(scope="module")
def networks(teacher_file) -> list[str]:
    varied = ["privacy=nopeek", f"frontier.strength.key={KEY}", "frontier.strength.values=[0,3]"]
    return [f"base.ckpt_path={teacher_file}", *varied]


@pytest.fixture(scope="module")
def composed(networks, tmp_path_factory):
    """A frontier's config; each test changes a copy, as composing takes half a second."""
    return config(tmp_path_factory.mktemp("composed"), *networks)


def changed(cfg, folder: Path, *given: str):
    found = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(given)))
    found.paths.output_dir = str(folder)
    return found


@pytest.fixture(scope="module")
def measured(networks, tmp_path_factory):
    """A frontier of two points: its folder, its config and what it returned."""
    folder = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{kind}_DIR", str(folder / "own"))
        cfg = config(folder, *networks, "logger=wandb", "logger.wandb.mode=offline", "wanted.mse=0.01")
        return folder, cfg, frontier(cfg)


def records(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "points").glob("*.json"))}


NAMES = ["layer2-4bits-4channels-strength0.0", "layer2-4bits-4channels-strength3.0"]


def test_every_point_has_a_record_of_accuracy_attack_bytes_and_macs(measured):
    folder, _, best = measured
    found = records(folder)
    assert list(found) == NAMES
    report = json.loads((folder / "frontier.json").read_text())
    assert [{**found[name], "front": each["front"]} for name, each in zip(NAMES, report["points"], strict=True)] == (
        report["points"]
    )
    assert [each["place"]["strength"] for each in report["points"]] == [0, 3]
    assert any(each["front"] for each in report["points"])
    for each in report["points"]:
        assert each["explained"]["low"] <= each["explained"]["high"]
        assert each["ssim"]["value"] < 1
        assert each["payload_bytes"] == 12 + 32  # an envelope, and 4·4·4 codes of 4 bits
        assert each["device_macs"] > 0
        assert -1 <= each["distance_correlation"] <= 1
        bounds = {bound["key"]: bound for bound in each["details"]["information"]["bounds"]}
        assert bounds["payload_bits"]["bits"]["value"] == 8 * 32
        assert bounds["infonce_bits"]["bits"]["value"] <= bounds["infonce_bits"]["ceiling"]
        assert bounds["infonce_bits"]["ceiling"] == pytest.approx(math.log2(20))
    with (folder / "frontier.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["mse"]) for row in rows] == [each["mse"]["value"] for each in report["points"]]
    assert best is not None
    assert report["best"] == {"layer": "layer2", "bits": 4, "channels": 4, "strength": best.place.strength}
    assert best.validation == max(each["validation"] for each in report["points"])
    assert report["weakest"] == {"layer2, 4 bits, 4 channels": 0}


def test_the_strength_reaches_the_training_and_nothing_of_the_frontier_does(measured):
    folder, _, _ = measured
    for name, weight in zip(NAMES, (0, 3), strict=True):
        trained = restore(folder / "runs" / name / "checkpoints/best.ckpt").config
        assert OmegaConf.select(trained, KEY) == weight
        assert not {"frontier", "wanted", "attack", "targets", "information"} & set(trained)
    first, second = (restore(folder / "runs" / name / "checkpoints/best.ckpt").network for name in NAMES)
    weights = zip(first.parameters(), second.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in weights)


def test_a_point_is_what_evaluate_and_attack_say_of_its_checkpoint(measured, tmp_path):
    folder, _, _ = measured
    file, record = folder / "runs" / NAMES[1] / "checkpoints/best.ckpt", records(folder)[NAMES[1]]
    metrics = evaluate(compose_config("evaluate", [f"ckpt_path={file}", *QUIET[:2]], tmp_path / "evaluate"))
    assert metrics["test/acc"] == pytest.approx(record["accuracy"], abs=1e-6)
    assert metrics["test/payload_bytes"] == record["payload_bytes"]
    files = attack(compose_config("attack", [f"ckpt_path={file}", *CHEAP], tmp_path / "attack"))
    report = json.loads(files["attack.json"].read_text())
    headline = report["headlines"][0]
    assert (headline["mse"], headline["explained"]) == (record["mse"], record["explained"])
    assert report["information"] == record["details"]["information"]
    kept = json.loads((folder / "runs" / NAMES[1] / "attack/attack.json").read_text())
    assert kept["attacks"] == report["attacks"]


def test_w_and_b_has_one_run_with_table_plot_and_pictures(measured):
    folder, _, best = measured
    (tracked,) = offline_runs(folder)
    assert (tracked.exit_codes, tracked.run.job_type) == ([0], "privacy_frontier")
    found = [record["explained"]["value"] for record in records(folder).values()]
    assert tracked.series("frontier/explained") == pytest.approx(found)
    assert tracked.summary["frontier/best_accuracy"] == pytest.approx(best.accuracy)
    assert [len(tracked.series(name)) for name in ("points", "frontier", "pictures")] == [1, 1, 1]
    assert {"frontier.csv", "frontier.json"} <= set(tracked.artifacts)
    for name in ("frontier.png", "pictures.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG"


@pytest.fixture
def again(measured, tmp_path):
    """A copy of the folder, which a test may change."""
    shutil.copytree(measured[0], tmp_path / "again")
    return tmp_path / "again"


def times(folder: Path) -> dict[str, int]:
    return {file.parent.parent.name: file.stat().st_mtime_ns for file in folder.glob("runs/*/checkpoints/best.ckpt")}


@pytest.mark.slow
def test_the_same_grid_goes_on_and_trains_only_what_is_missing(measured, again, tmp_path, capsys):
    _, cfg, _ = measured
    before, kept = times(again), records(again)
    (again / "points" / f"{NAMES[1]}.json").unlink()
    shutil.rmtree(again / "runs" / NAMES[1])
    own = changed(cfg, tmp_path / "run", f"frontier.folder={again}", "logger=null")
    own.wanted.mse = None
    assert frontier(own) is None
    assert times(again)[NAMES[0]] == before[NAMES[0]]
    assert times(again)[NAMES[1]] != before[NAMES[1]]
    told = capsys.readouterr().out
    assert re.search(r"^layer2, 4 bits, 4 channels, weight 0: .* from its record$", told, re.MULTILINE)
    assert re.search(r"^layer2, 4 bits, 4 channels, weight 3: .* in \d+ seconds$", told, re.MULTILINE)
    assert "2 points, 1 of them have a record" in told
    assert f"Next: python scripts/privacy_frontier.py frontier.folder={again} wanted.mse=…" in told
    assert json.loads((again / "frontier.json").read_text())["best"] is None
    # The same seeds, so the same figures.
    figures = [{**record, "details": {}} for record in (records(again)[NAMES[1]], kept[NAMES[1]])]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_a_training_that_was_interrupted_goes_on_to_the_same_figures(composed, tmp_path, monkeypatch):
    two = ["trainer.max_epochs=2", "frontier.strength.values=[3]"]
    frontier(changed(composed, tmp_path / "whole", *two))
    interrupted = changed(composed, tmp_path / "interrupted", *two)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "instantiate_each", lambda group: [*instantiate_each(group), FailAt(4)])
        with pytest.raises(KilledError):
            frontier(interrupted)
    run = tmp_path / "interrupted/runs" / NAMES[1]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 0
    frontier(interrupted)
    one, other = (records(tmp_path / name)[NAMES[1]] for name in ("whole", "interrupted"))
    assert {**one, "details": {}} == {**other, "details": {}}


def test_a_signal_leaves_what_is_measured_and_tells_how_to_go_on(composed, tmp_path, monkeypatch):
    def stopped(cfg):
        raise Stopped(15)

    monkeypatch.setattr(script, "frontier", stopped)
    with pytest.raises(Stopped) as raised:
        script.main(changed(composed, tmp_path))
    assert raised.value.in_words().splitlines()[1:] == [
        f"Points that were measured are kept in {tmp_path}",
        f"Go on: python scripts/privacy_frontier.py frontier.folder={tmp_path}",
    ]


def test_a_run_is_resumed_by_train_py_without_what_is_the_frontiers_own():
    given = ["frontier.bits=[2,4]", "wanted.mse=0.1", "split.at=layer1", "attack.epochs=3", "codec.bits=8", "seed=3"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("privacy_frontier", given, return_hydra_config=True)
    try:
        HydraConfig.instance().set_config(cfg)
        with run_of_another(["frontier", "wanted", "attack"], {"split.at": "layer2", "codec.bits": 2}):
            assert overrides() == ["seed=3", "split.at=layer2", "codec.bits=2"]
    finally:
        HydraConfig.instance().cfg = None


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_grid_is_over_layers_bits_channels_and_strengths(composed, tmp_path):
    varied = ["frontier.layers=[layer1,layer2]", "frontier.bits=[2,8]", "frontier.channels=[3]"]
    points = grid_points(changed(composed, tmp_path, *varied))
    assert len(points) == 8 == len({point.name for point in points})
    assert points[0].settings == {"split.at": "layer1", "codec.bits": 2, "bottleneck.channels": 3, KEY: 0}
    last = run_config(composed, points[-1].settings)
    assert (last.split.at, last.codec.bits, last.bottleneck.channels) == ("layer2", 8, 3)
    assert last.method.extra_terms.nopeek["of"][1] == "student/layer2/z"
    assert [last.method.extra_terms.nopeek.weight, composed.split.at, composed.codec.bits] == [3, "layer2", 4]


def test_a_learned_prior_has_no_bits_and_without_a_strength_there_is_none(tmp_path):
    own = ["codec=entropy", "method=entropic", "split.at=layer2", "frontier.channels=[2,4]"]
    points = grid_points(compose_config("privacy_frontier", own, tmp_path))
    found = [(point.place.bits, point.place.channels, point.place.strength) for point in points]
    assert found == [(None, 2, None), (None, 4, None)]
    assert points[0].name == "layer2-2channels"
    more = OmegaConf.from_dotlist(["frontier.bits=[2]"])
    with pytest.raises(ValueError, match=r"frontier\.bits=\[2\]: codec has no bits here"):
        grid_points(OmegaConf.merge(compose_config("privacy_frontier", own, tmp_path), more))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("trainer.max_epochs=2", r"settings\.trainer\.max_epochs differs"),
        ("attack.epochs=2", r"attack\.attack\.epochs differs"),
        ("targets.images=50", r"attack\.targets\.images differs"),
        ("bottleneck.width=8", r"settings\.bottleneck\.width differs"),
        ("seed=1", r"seed"),
        ("optimized_metric=val/ece", "chosen_by differs"),
        ("base.ckpt_path=OTHER", r"networks\.base\.file differs"),
    ],
)
def test_a_folder_of_another_frontier_is_refused(measured, composed, victim, tmp_path, other, named):
    (tmp_path / "other.ckpt").write_text("another network")
    cfg = changed(composed, tmp_path, other.replace("OTHER", f"{tmp_path}/other.ckpt"))
    with pytest.raises(ValueError, match=rf"{measured[0].name} is another frontier's: .*{named}"):
        FrontierFolder(measured[0], shared(cfg, grid_points(cfg), victim))


def test_the_steps_of_a_recipe_belong_to_a_frontier(networks, victim, tmp_path):
    recipe = ["experiment=bottlefit", "compare={layer3: 1.0}", "split.at=layer2", networks[0]]
    cfg = compose_config("privacy_frontier", recipe, tmp_path)
    folder = FrontierFolder(tmp_path, shared(cfg, grid_points(cfg), victim)).folder
    other = compose_config("privacy_frontier", [*recipe, "+steps.head.trainer.max_epochs=7"], tmp_path)
    with pytest.raises(ValueError, match=r"is another frontier's: recipe\.head\.trainer\.max_epochs differs"):
        FrontierFolder(folder, shared(other, grid_points(other), victim))


@pytest.fixture(scope="module")
def victim(composed):
    return rehearse(composed, grid_points(composed)[:1])


def test_another_grid_and_what_changes_no_figure_are_the_same_frontier(measured, composed, victim, tmp_path):
    others = ["frontier.strength.values=[1]", "frontier.bits=[2]", "frontier.layers=[layer1]", "wanted.mse=0.3"]
    cfg = changed(composed, tmp_path, *others, "pictures=1", "data.num_workers=1", "frontier.channels=[9]")
    FrontierFolder(measured[0], shared(cfg, grid_points(cfg), victim))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ""),
        ("[]", "it must hold place, validation"),
        ({"mse": {"value": 1}}, "its mse must hold value, low and high"),
        ({"accuracy": 3}, "accuracy must be a number from 0 to 1"),
        ({"validation": None}, "its validation must be a number, got None"),
        ({"place": {"layer": "layer1", "bits": 4, "channels": 4, "strength": 0.0}}, "it is of layer1"),
    ],
)
def test_a_damaged_record_is_told_with_its_file(measured, composed, victim, again, content, message):
    folder = FrontierFolder(again, shared(composed, grid_points(composed), victim))
    file = again / "points" / f"{NAMES[0]}.json"
    whole = json.loads(file.read_text())
    file.write_text(content if isinstance(content, str) else json.dumps({**whole, **content}))
    with pytest.raises(
        ValueError, match=rf"(?s)the record {file} is damaged: .*{message if message != 'is damaged' else ''}"
    ):
        folder.find(grid_points(composed)[0])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["frontier.strength.key=noise.epsilom"], r"noise\.epsilom: there is no such setting"),
        (["frontier.strength.key=null"], r"frontier\.strength\.values=\[0, 3\] says nothing without"),
        (["frontier.strength.key=codec.bits"], r"codec\.bits is no strength .* frontier\.bits"),
        (["frontier.strength.key=attack.epochs"], r"attack\.epochs is no strength of a defence"),
        (["frontier.strength.key=method.extra_terms.nopeek"], "no number that could be varied"),
        (["frontier.strength.values=[]"], r"frontier\.strength\.values must be one or more different numbers"),
        (["frontier.strength.values=[1,1]"], r"one or more different numbers of .* got \[1, 1\]"),
        (["frontier.strength.values=[1,x]"], r"frontier\.strength\.values must be numbers, got \[1, 'x'\]"),
        (["frontier.strength.hides_more=both"], r"hides_more must be larger, smaller or null, got 'both'"),
        (["frontier.bits=[2,2]"], r"frontier\.bits=\[2, 2\] names a value twice"),
        (["frontier.bits=[two]"], r"frontier\.bits must be whole numbers, got \['two'\]"),
        (["frontier.layers=[3]"], r"frontier\.layers must be names of layers, got \[3\]"),
        (["split.at=null"], r"split\.at=null: nothing is sent that could be attacked; .*frontier\.layers"),
        (
            ["split.form=none", "frontier.channels=[2]"],
            r"frontier\.channels=\[2\] would change nothing: split\.form=none",
        ),
        (
            ["codec.at.layer2.bits=3", "frontier.bits=[2]"],
            r"frontier\.bits=\[2\] would change nothing at layer2, where codec\.at\.layer2\.bits decides",
        ),
    ],
)
def test_a_grid_that_means_nothing_is_refused(given, message, composed, tmp_path):
    OmegaConf.set_struct(composed, False)
    with pytest.raises(ValueError, match=message):
        grid_points(changed(composed, tmp_path, *given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["ckpt_path=x.ckpt"], r"goes on by frontier\.folder=DIR"),
        (["train=false"], "train=false, test=false and export=true are options of train.py"),
        (["test=false"], "train=false, test=false and export=true are options of train.py"),
        (["export=true"], "train=false, test=false and export=true are options of train.py"),
        (["callbacks.checkpoint=null"], r"callbacks\.checkpoint=null keeps no weights"),
        (["trainer.devices=2"], r"trainer\.devices=2 would start the frontier once for each device"),
        (["links.path=[0,null,null,2]"], r"links\.path=.*attack a path by attack\.py bundle=DIR"),
        (["wanted.mse=0"], r"wanted\.mse must be a number above 0, .* got 0"),
        (["wanted.mse=high"], r"wanted\.mse must be a number above 0, .* got 'high'"),
        (["attack.epochs=0"], r"attack\.epochs must be a whole number of at least 1, got 0"),
        (["information.batch=3"], r"information\.batch must be at least 4"),
    ],
)
def test_what_a_frontier_cannot_do_is_refused(given, message, composed, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(changed(composed, tmp_path, *given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(
            ["frontier.bits=[4,99]"],
            r"layer2, 99 bits, 4 channels, strength 0: .*bits",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["frontier.layers=[layer2,layer9]"],
            "layer9, 4 bits, 4 channels, strength 0: .*no layer .layer9.",
            marks=pytest.mark.slow,
        ),
        (["frontier.strength.values=[0,-1]"], "layer2, 4 bits, 4 channels, strength -1: .*weight of a term"),
    ],
)
def test_a_point_that_cannot_be_built_is_named_before_any_is_trained(given, message, composed, tmp_path):
    with pytest.raises(ValueError, match=message):
        frontier(changed(composed, tmp_path, *given))
    assert not (tmp_path / "runs").exists()


def test_settings_have_their_types_here_too(composed, tmp_path):
    for key, told in (("attack.epochs", "a whole number"), ("export", "true or false")):
        with pytest.raises(TypeError, match=f"{key} must be {told}.*, got 'maybe'"):
            check_values(changed(composed, tmp_path, f"{key}=maybe"), CONF)
