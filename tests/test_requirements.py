"""What a device needs is listed, is all that is imported, and has wheels for ARM Linux."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cleave.deployment import CodecError, Pipeline, Side, export_bundle
from cleave.deployment.codecs.coder import stream

from .deployment_networks import INPUT, OUTPUTS, edge, entropy_codec, entropy_parts, images

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTED = [
    line
    for line in (ROOT / "deployment/requirements.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]
# Extras, imported by what needs them alone.
ON_DEMAND = ("cv2", "google", "grpc", "grpc_health", "grpc_reflection")
IMPORTED_AS = {"pillow": "PIL"}


def name_of(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower()


def test_a_device_needs_what_deployment_imports():
    found = set()
    for path in (ROOT / "deployment").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    needed = {IMPORTED_AS.get(name_of(line), name_of(line)) for line in LISTED}
    assert found - set(sys.stdlib_module_names) == needed | {"constriction", *ON_DEMAND}


def test_a_device_needs_no_other_versions_than_the_project():
    assert set(LISTED) <= set(PROJECT["dependencies"])


def test_the_entropy_coder_is_an_extra():
    assert "constriction" not in map(name_of, PROJECT["dependencies"])
    assert [name_of(line) for line in PROJECT["optional-dependencies"]["entropy"]] == ["constriction"]
    assert "cleave[dp,entropy,search,serve]" in PROJECT["optional-dependencies"]["dev"]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"constriction", *map(name_of, LISTED)} <= pinned


def test_serving_is_an_extra_of_both_packages():
    own = tomllib.loads((ROOT / "deployment/pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(own[name] == PROJECT["optional-dependencies"][name] for name in ("entropy", "serve", "video"))
    names = [name_of(line) for line in own["serve"]]
    assert names == ["grpcio", "grpcio-health-checking", "grpcio-reflection", "protobuf"]
    assert not set(names) & {*map(name_of, PROJECT["dependencies"]), *map(name_of, LISTED)}


def test_a_side_that_must_code_names_the_missing_coder_before_the_first_picture(tmp_path, monkeypatch):
    parts, edges = entropy_parts(), [edge("head", "tail", cut=entropy_codec())]
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    stream.cache_clear()
    monkeypatch.setitem(sys.modules, "constriction", None)
    for call in (lambda: Side(bundle, "device"), lambda: Side(bundle, "server"), lambda: Pipeline(bundle)):
        with pytest.raises(CodecError, match="extra `entropy`: pip install constriction"):
            call()
    monkeypatch.undo()
    assert Pipeline(bundle).run(images()).logits.shape == (5, 4)


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_device_on_arm_linux_finds_wheels_of_all_it_needs(tmp_path):
    if pip("download", "--no-deps", "--dest", str(tmp_path), "rfc8785").returncode:
        pytest.skip("there is no package index to ask")
    # pip takes each platform as it is written, where on a machine it would know the older ones itself.
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 40)]
    options = ["--dry-run", "--ignore-installed", f"--target={tmp_path}/target", "--only-binary=:all:"]
    options += ["--python-version=3.11", "--platform=manylinux2014_aarch64", *platforms]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    found = pip("install", "--quiet", *options, *constraints, "-r", str(ROOT / "deployment/requirements.txt"))
    assert found.returncode == 0, found.stderr[-2000:]
