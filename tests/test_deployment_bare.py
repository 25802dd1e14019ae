"""The device side where nothing is installed but what it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from .deployment_networks import make_bundle
from .serving_client import serving

ROOT = Path(__file__).resolve().parent.parent
# rfc8785 spells manifests; it is one file without needs of its own.
NEEDED = ("torch", "numpy", "pillow", "safetensors", "zstandard", "rfc8785", "grpcio", "protobuf")
CODE = """
import sys
sys.path[:0] = sys.argv[1:3]
import deployment, torch
assert deployment.__file__.startswith(sys.argv[2])
for name in ("pytorch_lightning", "hydra", "timm", "torchvision", "constriction", "cv2", "grpc_health", "rich"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is not away")
bundle = deployment.load_bundle(sys.argv[3], placement="device")
with deployment.Device(bundle, sys.argv[4]) as device:
    images = torch.randint(0, 256, (2, *bundle.input.shape), dtype=torch.uint8)
    print(tuple(device.run(images).result.logits.shape))
"""


def closure(names):
    """Distributions, and all that they need."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system
        for line in found[name].requires or ():
            if "extra ==" not in line:
                waiting.append(re.match(r"[\w.-]+", line)[0])
    return found


@pytest.mark.slow
def test_the_device_side_runs_where_nothing_else_is_installed(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for each in closure(NEEDED).values():
        for top in {file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source, target = Path(str(each.locate_file(top))), site / top
            if source.exists() and not target.exists():
                target.symlink_to(source)
    if not (site / "torch").exists() or (site / "hydra").exists():
        pytest.skip("packages are not installed one by one here")
    alone = tmp_path / "alone"
    shutil.copytree(ROOT / "deployment", alone / "deployment", ignore=shutil.ignore_patterns("__pycache__"))
    make_bundle(tmp_path / "net", "sample")
    with serving(tmp_path / "net") as (server, _):
        given = [str(site), str(alone), str(tmp_path / "net"), f"127.0.0.1:{server.port}"]
        # Without the folder of all packages that Python adds by itself.
        command = [sys.executable, "-I", "-S", "-c", CODE, *given]
        told = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.split("\n")[0] == "(2, 4)"
