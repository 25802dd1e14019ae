"""Every preset is composed and run, and every group's choices compose."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from scripts.assembly import compose_config, restore
from scripts.evaluate import evaluate
from scripts.terminal import CONF, quiet
from scripts.train import train

EXPERIMENTS = sorted(p.stem for p in (Path(CONF) / "experiment").glob("*.yaml"))
QUICK = ["trainer=cpu", "debug=limit", "logger=csv", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]


def needs_teacher(name: str, folder: Path) -> bool:
    return "teacher.ckpt_path" in OmegaConf.missing_keys(compose_config("train", [f"experiment={name}"], folder))


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_runs_tests_and_is_rebuilt_from_its_checkpoint(name, tmp_path, teacher_file):
    quiet()
    given = [f"teacher.ckpt_path={teacher_file}"] if needs_teacher(name, tmp_path) else []
    metrics = train(compose_config("train", [f"experiment={name}", *QUICK, *given], tmp_path))
    assert {"val/acc", "test/acc", "test/loss", "test/ece"} <= set(metrics)
    checkpoint = tmp_path / "checkpoints/best.ckpt"
    again = evaluate(compose_config("evaluate", [f"ckpt_path={checkpoint}", *OVERRIDES], tmp_path / "evaluate"))
    for metric, value in again.items():
        assert value == pytest.approx(metrics[metric], abs=1e-6), metric
    assert restore(checkpoint).class_names == restore(tmp_path / "checkpoints/last.ckpt").class_names


OVERRIDES = ["trainer=cpu", "+trainer.limit_test_batches=2", "+trainer.enable_progress_bar=false"]


def test_presets_say_what_is_missing(tmp_path):
    assert needs_teacher("digits_hnd", tmp_path)
    assert not needs_teacher("digits_teacher", tmp_path)


@pytest.mark.parametrize(
    "group",
    sorted(p.name for p in Path(CONF).iterdir() if p.is_dir() and p.name not in ("hydra", "paths", "experiment")),
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
    overrides = ["experiment=digits_hnd", f"teacher.ckpt_path={moved}", *QUICK, "test=false"]
    train(compose_config("train", overrides, tmp_path / "run"))
    moved.unlink()
    restored = restore(tmp_path / "run/checkpoints/best.ckpt")
    with torch.no_grad():
        assert restored.network(torch.randn(2, *restored.image_input.shape)).shape == (2, 10)
