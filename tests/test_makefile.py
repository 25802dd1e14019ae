"""What `make demo` installs and says, with a Python that only writes down what it is asked for."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FAKE = """#!/bin/sh
echo "$PIP_EXTRA_INDEX_URL| $*" >> "$ASKED"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""
ELSEWHERE = "https://example.invalid/cpu"


@pytest.fixture
def clone(tmp_path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name, content in (
        ("python3", FAKE),
        ("nvidia-smi", "#!/bin/sh\nexit 9\n"),
        ("uname", "#!/bin/sh\necho Linux\n"),
    ):
        program(tmp_path / "bin" / name, content)
    return tmp_path


def program(file: Path, content: str) -> None:
    file.write_text(content)
    file.chmod(0o755)


def make(clone: Path, *arguments: str, **env: str) -> str:
    """Run make and return what it printed beside the commands that it runs."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "MAKE"))}
    clean |= {"PATH": f"{clone}/bin:{os.environ['PATH']}", "ASKED": str(clone / "asked"), **env}
    command = ["make", "--silent", *arguments]
    return subprocess.run(command, cwd=clone, env=clean, capture_output=True, text=True, timeout=60, check=True).stdout


def asked(clone: Path) -> list[str]:
    """What Python was asked for, each with pip's further index before it."""
    return [line.replace(".venv/bin/", "") for line in (clone / "asked").read_text().splitlines()]


def installs(clone: Path) -> list[str]:
    return [line.rpartition(" ")[2] for line in asked(clone) if "pip install" in line]


def test_the_demo_installs_no_tools_of_developers_and_says_how_to_do_without_cuda(clone):
    (line,) = make(clone, "demo").splitlines()
    assert "PIP_EXTRA_INDEX_URL=URL" in line
    assert "https://pytorch.org/get-started/locally/" in line
    assert installs(clone) == ["."]
    assert asked(clone)[-1].endswith("scripts/demo.py")
    assert make(clone, "demo") == ""  # what is installed has no CUDA
    assert installs(clone) == ["."]
    make(clone, "test")
    assert installs(clone) == [".", ".[dev]"]
    make(clone, "demo", "test")
    assert installs(clone) == [".", ".[dev]"]


def test_what_tests_need_is_all_that_the_demo_needs(clone):
    make(clone, "test")
    make(clone, "demo")
    assert installs(clone) == [".[dev]"]


def test_cuda_libraries_that_are_there_are_named_again(clone):
    make(clone, "demo")
    (clone / ".venv/lib/python3.12/site-packages/nvidia").mkdir(parents=True)
    assert "PIP_EXTRA_INDEX_URL=URL" in make(clone, "demo")


@pytest.mark.parametrize("where", ["environment", "command line"])
def test_a_further_index_reaches_pip_and_is_answer_enough(clone, where):
    told = make(clone, "demo", PIP_EXTRA_INDEX_URL=ELSEWHERE) if where == "environment" else ""
    told += make(clone, "demo", f"PIP_EXTRA_INDEX_URL={ELSEWHERE}") if where == "command line" else ""
    assert told == ""
    (line,) = [line for line in asked(clone) if "pip install" in line]
    assert line.startswith(f"{ELSEWHERE}| ")


def test_with_a_gpu_nothing_is_said(clone):
    program(clone / "bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0'\n")
    assert make(clone, "demo") == ""


def test_torch_for_the_cpu_fits_the_pinned_versions():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "torchvision"):
        assert Requirement(f"{name}=={pins[name]}").specifier.contains(f"{pins[name]}+cpu")


def test_the_demo_needs_no_tools_of_developers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}  # type: ignore[index]
    assert not needed & {"scikit-learn", "mypy", "pytest", "ruff", "pre-commit"}
    for folder in ("scripts", "datamodules", "reports", "lightning_modules", "architectures", "planning", "losses"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^(import|from) sklearn", file.read_text(), re.MULTILINE), file


def test_no_file_names_the_host_of_a_package_registry():
    for name in ("Makefile", "README.md", "CONTRIBUTING.md", "pyproject.toml", "constraints.txt", ".ci/run"):
        assert not re.search(r"download\.pytorch|pypi\.org|pythonhosted", (ROOT / name).read_text()), name
