"""A command that only answers a question imports no framework: `--help`, a misspelt key, completion."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from .test_docs import SCRIPTS, commands_in, mistake, settings  # noqa: F401
from .training_helpers import ROOT, python_path

FRAMEWORKS = {"torch", "pytorch_lightning", "torchvision", "timm", "wandb", "matplotlib", "numpy"}
# One process imports Hydra and forks one for each command line, as Hydra takes longer to import than most of them take.
PROBE = """
import hydra, json, os, runpy, sys, traceback
from hydra import compose, initialize_config_dir
sys.path.append("tests")
from parsed_configs import parse_once
parse_once()
with initialize_config_dir(os.path.abspath("conf"), version_base="1.3"):
    compose("train")  # Hydra looks for its plugins once
for name, arguments, more, file in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.environ.update(more)
        sys.argv = [f"scripts/{name}.py", *arguments]
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 99
        print("imported:", *sys.modules, flush=True)
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class Said(NamedTuple):
    status: int
    text: str


def asked(folder: Path) -> dict[str, tuple[str, list[str], dict[str, str]]]:
    """The command lines by a name: a script, its arguments, its environment."""
    run = f"hydra.run.dir={folder}/run"
    found = {}
    for name in SCRIPTS:
        line = f"python scripts/{name}.py task_n"
        found[f"{name} help"] = (name, ["--help"], {})
        found[f"{name} misspelt"] = (name, ["task_nme=x"], {})
        found[f"{name} TAB"] = (name, ["-sc", "query=bash"], {"COMP_LINE": line, "COMP_POINT": str(len(line))})
    found["choice"] = ("train", ["experiment=digits_teachr"], {})
    found["missing"] = ("export", [run], {})
    found["null"] = ("train", [run, "teacher=null"], {})
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, Said]:
    folder = tmp_path_factory.mktemp("said")
    lines = asked(folder)
    requests = [[*line, str(folder / str(i))] for i, line in enumerate(lines.values())]
    env = {**os.environ, "PYTHONPATH": python_path(), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(requests),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    found = {}
    for name, request, status in zip(lines, requests, result.stdout.split(), strict=True):
        text, _, imported = Path(request[-1]).read_text().rpartition("imported:")
        assert not FRAMEWORKS & set(imported.split()), f"{name} imported a framework"
        assert "Traceback" not in text
        found[name] = Said(int(status), text)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_examples_that_compose(name, said, settings):  # noqa: F811
    status, text = said[f"{name} help"]
    assert status == 0
    assert "== Config ==" in text
    examples = re.findall(rf"^  (python scripts/{name}\.py .*)$", text, re.MULTILINE)
    assert len(examples) >= 2
    for command in commands_in(examples):
        assert command[0] == name
        assert not mistake(settings, *command)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_misspelt_key_is_told_at_once(name, said):
    status, text = said[f"{name} misspelt"]
    assert status == 1
    assert "task_nme" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_completion_completes_at_once(name, said):
    assert said[f"{name} TAB"] == (0, "task_name=\n")


def test_groups_are_listed_as_hydra_lists_them(settings):  # noqa: F811
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType

    from cleave.scripts.assembly.starting import hydra_extensions

    hydra_extensions.extend_hydra()
    loader = GlobalHydra.instance().config_loader()
    assert "digits" in loader.get_group_options("data")
    for group in ("", "data", "hydra", "hydra/launcher", "experiment", "nowhere"):
        for kind in (ObjectType.CONFIG, ObjectType.GROUP):
            assert loader.get_group_options(group, kind) == hydra_extensions._copying(loader, group, kind)


def test_a_misspelt_choice_a_missing_value_and_a_group_set_to_null_are_told_at_once(said):
    assert "digits_teacher" in said["choice"].text
    assert said["missing"].status == 1
    assert said["missing"].text.startswith("ValueError: ckpt_path has no value; add ckpt_path=…\n")
    assert said["null"].status == 1
    assert "teacher.ckpt_path" in said["null"].text
