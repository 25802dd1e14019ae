"""A project of one's own, ``--config-dir``: its presets come first, its modules import, and commands name it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cleave.scripts.assembly.starting import program as naming
from cleave.scripts.assembly.starting.program import program
from cleave.scripts.assembly.starting.project import import_projects
from cleave.scripts.assembly.starting.stopping import going_on

from .training_helpers import script

ROOT = Path(__file__).resolve().parent.parent
NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in a folder with a space, with a module, and two presets that Cleave has as well."""
    folder = tmp_path / "my project"
    files = {
        "project_parts/net.py": NET,
        "conf/trainer/cpu.yaml": "defaults: [default]\naccelerator: cpu\nmax_epochs: 1\nenable_progress_bar: false\n",
        "conf/experiment/bottlefit.yaml": "# @package _global_\ntags: [mine]\n",
        "conf/experiment/own.yaml": (
            "# @package _global_\n"
            "defaults: [override /trainer: cpu, override /logger: none, override /backbone: custom]\n"
            "backbone: {network: {_target_: project_parts.net.Net}, in_channels: 1}\ndata: {image_size: 8}\n"
            "trainer: {limit_train_batches: 2, limit_val_batches: 1, limit_test_batches: 1}\n"
            "callbacks: {progress: null}\n"
        ),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_project_brings_its_presets_and_modules_without_touching_the_path(project, tmp_path):
    conf = project / "conf"
    result = script("train", "--config-dir", str(conf), "experiment=own", "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "presets" in line]
    assert said == [f"{conf} has presets of Cleave's names, which are taken: experiment/bottlefit, trainer/cpu"]
    assert "Next: " in result.stdout


def test_a_projects_preset_wins_over_cleaves_of_the_same_name(project, tmp_path):
    options = ["--cfg", "job", "experiment=bottlefit", "--package"]
    ours = script("train", *options, "tags", cwd=tmp_path)
    theirs = script("train", "--config-dir", str(project / "conf"), *options, "tags", cwd=tmp_path)
    assert "- mine" in theirs.stdout
    assert "- mine" not in ours.stdout
    assert not ours.stderr
    trainer = script(
        "train", f"--config-dir={project}/conf", "trainer=cpu", "--cfg", "job", "-p", "trainer", cwd=tmp_path
    )
    assert "max_epochs: 1\n" in trainer.stdout


def test_presets_of_names_of_ones_own_are_said_nothing_of(project, tmp_path):
    for name in ("trainer/cpu", "experiment/bottlefit"):
        (project / f"conf/{name}.yaml").unlink()
    result = script("train", "-cd", str(project / "conf"), "--cfg", "job", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_completion_of_a_project_prints_choices_alone(project, tmp_path):
    words = ["-sc", "query=bash", "--config-dir", str(project / "conf")]
    result = script("train", *words, cwd=tmp_path, COMP_LINE="python train.py experiment=ow")
    assert (result.stdout, result.stderr) == ("experiment=own\n", "")


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    result = script("train", "--config-dir", "nowhere", cwd=tmp_path)
    assert result.returncode == 1
    assert re.search(r"config directory '.*nowhere' not found", result.stderr)
    assert "Traceback" not in result.stderr


@pytest.fixture
def started(monkeypatch):
    """Pretends that this process was started by a command."""
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: False))
    return lambda name: monkeypatch.setattr(sys, "argv", [str(name)])


def test_commands_are_named_as_this_one_was_started(started, tmp_path, monkeypatch):
    started(ROOT / "scripts/train.py")
    monkeypatch.chdir(ROOT)
    assert program("exits_report") == "python scripts/exits_report.py"
    monkeypatch.chdir(tmp_path)
    assert program("evaluate") == f"python {shlex.quote(str(ROOT / 'scripts/evaluate.py'))}"
    started("/usr/bin/pytest")
    assert program("evaluate") == "python scripts/evaluate.py"
    monkeypatch.setattr(naming, "CLONE", tmp_path)
    assert program("evaluate") == "cleave-evaluate"


def test_an_installed_command_names_others_by_their_names_or_their_places(started, tmp_path, monkeypatch):
    folder = tmp_path / "an environment/bin"
    folder.mkdir(parents=True)
    for name in ("cleave-train", "cleave-exits-report"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    started(folder / "cleave-train")
    monkeypatch.setenv("PATH", str(folder))
    assert program("exits_report") == "cleave-exits-report"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program("exits_report") == shlex.quote(str(folder / "cleave-exits-report"))
    monkeypatch.chdir(tmp_path)
    assert program("exits_report") == "'an environment/bin/cleave-exits-report'"


def test_a_resumed_run_brings_its_project_along(monkeypatch, tmp_path):
    sources = [
        {"path": "hydra.conf", "schema": "pkg", "provider": "hydra"},
        {"path": str(tmp_path / "my conf"), "schema": "file", "provider": "command-line"},
        {"path": str(ROOT / "conf"), "schema": "file", "provider": "main"},
        {"path": str(tmp_path / "my conf"), "schema": "file", "provider": "command-line"},
    ]
    given = {"task": ["experiment=own"], "hydra": []}
    config = OmegaConf.create({"runtime": {"config_sources": sources}, "overrides": given})
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    assert going_on("last.ckpt") == (
        "python scripts/train.py --config-dir 'my conf' experiment=own ckpt_path=last.ckpt"
    )
    monkeypatch.setattr(sys, "argv", ["/opt/bin/cleave-train"])
    assert going_on("last.ckpt") == ("/opt/bin/cleave-train --config-dir 'my conf' experiment=own ckpt_path=last.ckpt")
    monkeypatch.setattr(sys, "path", list(sys.path))
    import_projects()
    assert sys.path[-1] == str(tmp_path)


def test_the_example_of_a_project_composes_and_its_parts_are_there(tmp_path):
    example = ROOT / "examples/own_project"
    words = ["--config-dir", str(example / "conf"), "experiment=stripes", "--cfg", "job"]
    result = script("train", *words, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    named = set(re.findall(r"_target_: own_parts\.(\w+)\.(\w+)", result.stdout))
    assert named == {
        ("backbone", "StripeNet"),
        ("loss", "FocalLoss"),
        ("codec", "dead_zone_codec"),
        ("data", "Stripes"),
    }
    for module, name in named:
        assert re.search(rf"^(class|def) {name}\(", (example / f"own_parts/{module}.py").read_text(), re.MULTILINE)
    presets = {path.relative_to(example / "conf") for path in (example / "conf").rglob("*.yaml")}
    assert not any((ROOT / "conf" / preset).exists() for preset in presets)
