"""The wheels: what is in them, and what they do where they are installed."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image

from cleave.deployment import Pipeline

from .deployment_networks import images, make_bundle

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, ROOMS = SETTINGS["project"], SETTINGS["tool"]["slipcover"]["source"].split(",")
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("[!_]*.py"))
TRAINING = [
    "pytorch_lightning", "lightning_fabric", "timm", "torchvision", "torchmetrics", "hydra", "omegaconf", "wandb",
    "sklearn", "matplotlib", "rich", "cleave",
]  # fmt: skip


class Wheels(NamedTuple):
    cleave: Path
    runtime: Path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Wheels:
    """Both wheels, as `make dist` builds them, of a copy of the sources: a build leaves files behind."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in (*ROOMS, "conf", "package"):
        ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    (source / "conf/local").mkdir(exist_ok=True)
    (source / "conf/local/default.yaml").write_text("# this machine's own\n")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(dist), ".", "./deployment"]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    (cleave,), (runtime,) = dist.glob("cleave-*.whl"), dist.glob("cleave_runtime-*.whl")
    return Wheels(cleave, runtime)


def inside(wheel: Path, name: str) -> str:
    """The text of a file of a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(each for each in archive.namelist() if each.endswith(f".dist-info/{name}"))).decode()


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_is_the_whole_product(wheels):
    found = files(wheels.cleave)
    assert {name.partition("/")[0] for name in found} == {"cleave"}
    code = {f"cleave/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    local = ROOT / "conf/local/default.yaml"
    presets = {f"cleave/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml") if path != local}
    data = {"cleave/datamodules/sets/digits.npz", "cleave/py.typed", "cleave/deployment/py.typed"}
    assert found == code | presets | data | {"cleave/__init__.py"}
    assert "cleave/conf/data/digits.yaml" in found
    assert Parser().parsestr(inside(wheels.cleave, "METADATA"))["Version"] == PROJECT["version"]


def test_every_script_is_a_command(wheels):
    points = configparser.ConfigParser()
    points.read_string(inside(wheels.cleave, "entry_points.txt"))
    commands = "cleave.scripts.assembly.starting.commands"
    expected = {f"cleave-{name.replace('_', '-')}": f"{commands}:{name}" for name in SCRIPTS}
    assert dict(points["console_scripts"]) == expected


def test_the_runtime_is_the_deployment_room_alone(wheels):
    room = ROOT / "deployment"
    code = {f"cleave_runtime/{path.relative_to(room)}" for path in room.rglob("*.py")}
    assert files(wheels.runtime) == code | {"cleave_runtime/py.typed"}
    metadata = Parser().parsestr(inside(wheels.runtime, "METADATA"))
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"].replace(" ", "") == ",".join(sorted(PROJECT["requires-python"].split(",")))
    lines = (line for line in (room / "requirements.txt").read_text().splitlines() if not line.startswith("#"))
    needed, *extra = split_requirements(metadata.get_all("Requires-Dist"))
    assert needed == {normal(line) for line in lines if line}
    extras = {name: PROJECT["optional-dependencies"][name] for name in ("entropy", "serve", "video")}
    assert extra == [{f'{normal(line)};extra=="{name}"' for name, lines in extras.items() for line in lines}]
    assert "Apache" in inside(wheels.runtime, "licenses/LICENSE")


def split_requirements(lines: list[str]) -> list[set[str]]:
    found = {normal(line) for line in lines}
    extra = {line for line in found if "extra" in line}
    return [found - extra, extra]


def normal(requirement: str) -> str:
    """A requirement without spaces, its bounds in order."""
    requirement, _, marker = requirement.replace(" ", "").partition(";")
    name, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
    return name.lower() + ",".join(sorted(bounds.split(","))) + (f";{marker}" if marker else "")


RUNNER = """
import sys, torch

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
import cleave_runtime
assert cleave_runtime.__file__.startswith({alone!r})
bundle = cleave_runtime.load_bundle({bundle!r})
bundle.self_test()
images = torch.load({images!r}, weights_only=True)
torch.save(cleave_runtime.Pipeline(bundle).run(images).logits, {logits!r})
device, server = (cleave_runtime.Side(bundle, place) for place in ("device", "server"))
sent = device.run(images, request=1).messages["server"]
assert server.run(sent, request=1).outputs["logits"].shape == (len(images), len(bundle.class_names))
assert not {{name.split(".")[0] for name in sys.modules}} & set({blocked!r})
"""


@pytest.mark.slow
def test_the_runtime_runs_a_bundle_without_the_training_stack(wheels, tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    alone, logits = tmp_path / "alone", tmp_path / "logits.pt"
    with zipfile.ZipFile(wheels.runtime) as archive:
        archive.extractall(alone)
    torch.save(images(), tmp_path / "images.pt")
    given = {"alone": str(alone), "bundle": str(tmp_path / "bundle"), "blocked": TRAINING}
    code = RUNNER.format(**given, images=str(tmp_path / "images.pt"), logits=str(logits))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(alone)}, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(logits, weights_only=True), Pipeline(bundle).run(images()).logits)


# --- installed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory) -> Path:
    """The folder of commands of an environment that has the wheel, and what it needs from this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=100)
    python = environment / "bin/python"
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    # Behind its own packages; what .pth files there name, such as a clone, is left out.
    (site / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheels.cleave,
    ]
    subprocess.run(pip, check=True, timeout=200)
    return environment / "bin"


def run(command: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an installed command where this process's paths do not reach."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PATH": f"{command.parent}:{environment['PATH']}"}
    result = subprocess.run(
        [command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, f"{command.name} {' '.join(arguments)}:\n{result.stdout}{result.stderr}"
    return result


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_project_of_ones_own_runs_from_the_wheel(installed, tmp_path):
    project = tmp_path / "own_project"
    shutil.copytree(ROOT / "examples/own_project", project, ignore=shutil.ignore_patterns("logs", "__pycache__"))
    options = ["--config-dir", "conf", "trainer=cpu", "+trainer.enable_progress_bar=false"]
    told = run(
        installed / "cleave-train", *options, "experiment=stripes", "callbacks.progress=null", cwd=project
    ).stdout
    checkpoint = re.search(r"^Checkpoint: (.*)$", told, re.MULTILINE)[1]
    given = [*options, f"ckpt_path={checkpoint}", "trust_checkpoint=true"]
    assert float(re.search(r"test/acc\s+│\s+([\d.]+)", told)[1]) > 0.9
    measured = run(installed / "cleave-evaluate", *given, cwd=project).stdout
    assert re.search(r"test/acc\s+│\s+([\d.]+)", measured)[1] == re.search(r"test/acc\s+│\s+([\d.]+)", told)[1]
    run(installed / "cleave-export", *given, "bundle=bundle", cwd=project)
    picture = tmp_path / "picture.png"
    Image.fromarray(images()[0].numpy().transpose(1, 2, 0)).save(picture)
    ran = run(installed / "cleave-infer", "bundle=bundle", f"input={picture}", cwd=tmp_path / "own_project").stdout
    assert re.search(r"picture\.png\s*│\s*(lying|standing|slanting)", ran)
    versions = json.loads((project / "bundle/manifest.json").read_text())["versions"]
    assert versions["cleave"] == PROJECT["version"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "demo"])
def test_every_installed_command_takes_the_arguments_of_its_script(name, installed, tmp_path):
    words = ["--cfg", "job"]
    told = run(installed / f"cleave-{name.replace('_', '-')}", *words, cwd=tmp_path).stdout
    script = subprocess.run(
        [sys.executable, ROOT / f"scripts/{name}.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert told == script.stdout
    assert f"task_name: {name}" in told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_of_an_installed_command_train_together(installed, tmp_path):
    few = ["+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "trainer.max_epochs=1", "test=false"]
    plain = ["logger=none", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]
    given = ["experiment=digits_teacher", "trainer=ddp_sim", *few, *plain, "hydra.run.dir=run"]
    result = run(installed / "cleave-train", *given, cwd=tmp_path)
    assert (tmp_path / "run/checkpoints/best.ckpt").is_file()
    assert "GPU available" not in result.stdout + result.stderr  # both processes keep frameworks quiet


# --- what stands beside the code --------------------------------------------------------------------------------------


def test_one_version_stands_everywhere():
    runtime = tomllib.loads((ROOT / "deployment/pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## \[(\d[\w.]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert runtime == citation["version"] == released[0][0] == PROJECT["version"]
    assert str(citation["date-released"]) == released[0][1]
    assert citation["license"] == PROJECT["license"]


def test_the_workflow_runs_every_python_and_the_lowest_versions():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    least, most = (int(bound.partition(".")[2]) for bound in PROJECT["requires-python"].lstrip(">=").split(",<"))
    assert matrix["python"] == [f"3.{minor}" for minor in range(least, most)]
    assert {"python": f"3.{least}", "versions": "lowest"} in matrix["include"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    named = {target for text in steps for target in re.findall(r"make ([a-z-]+)", text)}
    assert named >= {"lint", "test", "lowest", "dist"}
    assert named <= set(targets)
    for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(file.read_text()), file


def test_pins_meet_every_bound():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(
        line.partition(";")[0].strip().lower().replace("_", "-").split("==") for line in lines if "==" in line
    )
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["entropy"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), line
