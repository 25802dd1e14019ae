"""A room imports only from rooms above it."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAINING = {"pytorch_lightning", "hydra", "omegaconf", "wandb"}
# From the first to the last: a room imports only from those before it, and never what is forbidden to it.
ROOMS: dict[str, set[str]] = {
    "losses": {*TRAINING, "torchmetrics", "timm", "torchvision"},
    "deployment": {*TRAINING, "torchmetrics", "timm", "torchvision", "cleave"},
    "architectures": TRAINING,
    "datamodules": {"hydra", "omegaconf", "wandb", "timm"},
    "planning": TRAINING,
    "lightning_modules": {"hydra", "omegaconf"},
    "reports": {"hydra", "omegaconf"},
    "scripts": set(),
}
# Neighbours that a room above them does without.
APART = {
    "deployment": {"losses"},
    "datamodules": {"losses", "architectures"},
    "planning": {"datamodules"},
    "lightning_modules": {"planning"},
}


def imported(path: Path) -> set[str]:
    """What a file imports from anywhere, inside functions too: first names, and rooms as ``cleave.ROOM``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "cleave":
            names = [f"cleave.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        else:
            continue
        for first, *rest in (name.split(".") for name in names):
            found |= {first, f"cleave.{rest[0]}"} if first == "cleave" and rest else {first}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    order = list(ROOMS)
    below = {*order[order.index(room) + 1 :], *APART.get(room, ())}
    forbidden = ROOMS[room] | {f"cleave.{other}" for other in below}
    broken = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported(f) & forbidden)}
    assert not broken


def test_rooms_are_imported_by_their_full_names():
    """``import losses`` at the root of the repository would give a second class of each name."""
    folders = [*ROOMS, "tests", "benchmarks"]
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    bare = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported(f) & set(ROOMS))}
    assert not bare
    pattern = re.compile(rf"_target_\W+({'|'.join(ROOMS)})\.|[\"']({'|'.join(ROOMS)})\.[a-z_]+\.[a-zA-Z_]")
    texts = [*files, *(ROOT / "conf").rglob("*.yaml"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {str(f.relative_to(ROOT)): found[0] for f in texts if (found := pattern.search(f.read_text()))}
    assert not named


def test_torchscript_stands_in_one_file():
    users = [
        str(f.relative_to(ROOT)) for room in ROOMS for f in (ROOT / room).rglob("*.py") if "torch.jit." in f.read_text()
    ]
    assert users == ["deployment/bundle/torchscript.py"]


def test_weights_are_never_unpickled():
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "torch.load",
                    "pickle.load",
                    "pickle.loads",
                ):
                    assert "weights_only=True" in ast.unparse(node), f"{file}:{node.lineno}"


def test_every_list_of_rooms_is_this_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    folders = [file.parent.relative_to(ROOT) for room in ROOMS for file in sorted((ROOT / room).rglob("__init__.py"))]
    assert sorted(packages) == sorted(["cleave", "cleave.conf", *(".".join(("cleave", *f.parts)) for f in folders)])
    assert sorted(project["tool"]["slipcover"]["source"].split(",")) == sorted(ROOMS)
    makefile = re.search(r"^ROOMS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile is not None
    assert makefile[1].split() == list(ROOMS)
