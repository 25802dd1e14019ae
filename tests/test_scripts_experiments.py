"""Every preset is composed and run, and every group's choices compose."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from cleave.reports.rates.collect import collect
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import CONF, missing_values, quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.train import train

EXPERIMENTS = sorted(p.stem for p in (Path(CONF) / "experiment").glob("*.yaml"))
# What tests of methods, exits and links train as well.
ELSEWHERE = ["digits_exits", "digits_hnd", "entropic_student", "links", "shao_vfe", "vib", "zero_time_waste"]
# What the presets that suit any data leave to the user: some must be given, of the others there is a default.
GIVEN = {"compare": "{layer2: 1.0, layer3: 0.5}", "beta": "1.0"}
LENT = ["links.local_blocks=[layer1,layer2,layer3]", "links.host_blocks=[features.2,features.5]", "host.num_classes=10"]
LENT += ["+backbone@host.backbone=cifar", "host.backbone.name=alexnet", "+host.backbone.kwargs.width=0.1"]
LENT += ["host.weights=random", "links.path=[0,0,1,2]"]
DIGITS = ["backbone.name=resnet20", "backbone.in_channels=1", "data.image_size=8"]
QUICK = ["trainer=cpu", "debug=limit", "trainer.detect_anomaly=false", "logger=csv", "callbacks.progress=null"]
QUICK += ["trainer.max_epochs=1", "+trainer.enable_progress_bar=false"]


def missing(name: str, folder: Path) -> set[str]:
    return set(missing_values(compose_config("train", [f"experiment={name}"], folder)))


def needed(name: str, folder: Path, teacher_file: Path) -> list[str]:
    """Overrides that give an experiment what it asks of its user."""
    if name == "digits_teacher":
        return []
    asked = missing(name, folder)
    overrides = [f"{key}={value}" for key, value in GIVEN.items() if key in asked]
    if name == "links":
        overrides += [*DIGITS, *LENT]
    elif not name.startswith("digits"):
        overrides += [*DIGITS, "exits.count=2" if name == "zero_time_waste" else "split.at=layer2"]
    return [*overrides, f"base.ckpt_path={teacher_file}"]


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ELSEWHERE)) for name in EXPERIMENTS]
)
def test_each_experiment_runs_tests_and_is_rebuilt_from_its_checkpoint(name, tmp_path, teacher_file):
    quiet()
    given = needed(name, tmp_path, teacher_file)
    metrics = train(compose_config("train", [f"experiment={name}", *QUICK, *given], tmp_path))
    assert {"val/acc", "test/acc", "test/loss", "test/ece"} <= set(metrics)
    (point,) = collect([tmp_path])
    around_exits = "test/policy/acc" in metrics
    assert point.accuracy == pytest.approx(metrics["test/policy/acc" if around_exits else "test/acc"])
    assert point.kind == ("baseline" if name == "digits_teacher" else "run")
    assert (point.payload_bytes == 64) == ("test/payload_bytes" not in metrics)
    checkpoint = max(tmp_path.rglob("best.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    again = evaluate(compose_config("evaluate", [f"ckpt_path={checkpoint}", *OVERRIDES], tmp_path / "evaluate"))
    for metric, value in again.items():
        assert value == pytest.approx(metrics[metric], abs=1e-6), metric
    assert restore(checkpoint).class_names == restore(checkpoint.with_name("last.ckpt")).class_names


OVERRIDES = ["trainer=cpu", "+trainer.limit_test_batches=2", "+trainer.enable_progress_bar=false"]


def test_presets_say_what_is_missing(tmp_path):
    assert missing("digits_teacher", tmp_path) == missing("digits_hnd", tmp_path) == set()
    assert missing("bottlefit", tmp_path) == {"compare"}
    assert missing("entropic_student", tmp_path) == {"compare", "beta"}


NOT_CHOSEN = ("hydra", "paths", "experiment")


@pytest.mark.parametrize(
    "group",
    sorted(p.name for p in Path(CONF).iterdir() if p.is_dir() and p.name not in NOT_CHOSEN),
)
def test_every_choice_of_a_group_composes(group):
    for choice in sorted(p.stem for p in (Path(CONF) / group).glob("*.yaml")):
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("train", [f"{group}={choice}"])
        assert cfg.trainer._target_ == "pytorch_lightning.Trainer"


def test_presets_override_and_do_not_repeat():
    for file in (Path(CONF) / "experiment").glob("*.yaml"):
        assert len(file.read_text().splitlines()) <= 20, file


def test_the_teachers_file_may_be_gone_when_a_student_is_rebuilt(tmp_path, teacher_file):
    quiet()
    moved = tmp_path / "teacher.ckpt"
    moved.write_bytes(teacher_file.read_bytes())
    overrides = ["experiment=digits_hnd", f"base.ckpt_path={moved}", *QUICK, "test=false"]
    train(compose_config("train", overrides, tmp_path / "run"))
    moved.unlink()
    restored = restore(tmp_path / "run/checkpoints/best.ckpt")
    with torch.no_grad():
        assert restored.network(torch.randn(2, *restored.image_input.shape)).shape == (2, 10)
