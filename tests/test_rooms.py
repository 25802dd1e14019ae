"""A room imports only from rooms above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["losses", "deployment", "architectures", "datamodules", "lightning_modules", "planning", "scripts"]
FORBIDDEN = {
    "losses": {*ROOMS, "pytorch_lightning", "hydra", "omegaconf", "timm", "torchvision", "wandb"},
    "deployment": {*ROOMS, "pytorch_lightning", "hydra", "omegaconf", "timm", "torchvision", "wandb", "torchmetrics"},
    "architectures": {
        "datamodules",
        "lightning_modules",
        "planning",
        "scripts",
        "pytorch_lightning",
        "hydra",
        "omegaconf",
        "wandb",
    },
    "datamodules": {
        "losses",
        "architectures",
        "lightning_modules",
        "planning",
        "scripts",
        "hydra",
        "omegaconf",
        "wandb",
        "timm",
    },
    "lightning_modules": {"planning", "scripts", "hydra", "omegaconf"},
    "planning": {"datamodules", "lightning_modules", "scripts", "pytorch_lightning", "hydra", "omegaconf", "wandb"},
}
# Rooms that name themselves; deployment may not.
OWN = {"losses", "architectures", "datamodules", "lightning_modules", "planning"}


def imported(path: Path) -> set[str]:
    """First names of every absolute import in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_from_rooms_above_it(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    allowed = {room} if room in OWN else set()
    broken = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported(f) & FORBIDDEN[room] - allowed)}
    assert not broken


def test_torchscript_stands_in_one_file():
    users = [
        str(f.relative_to(ROOT)) for room in ROOMS for f in (ROOT / room).rglob("*.py") if "torch.jit." in f.read_text()
    ]
    assert users == ["deployment/torchscript.py"]


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
