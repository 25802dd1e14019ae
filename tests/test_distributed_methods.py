"""Two processes with half the batch each train what one process with the whole batch trains, whatever the method."""

import json
import os
import subprocess
import sys

import pytest
import torch

from .training_helpers import ROOT

METHODS = ["cross_entropy", "head_distillation", "joint_exits", "learned_scale"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which one process and two have trained each method; starting them takes longest."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, str(ROOT / "tests/distributed_methods.py"), ",".join(METHODS), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def results(folder, method, processes):
    state = torch.load(folder / f"{method}-{processes}.pt", weights_only=True)
    return state, json.loads((folder / f"{method}-{processes}.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method, ran):
    (one, metrics), (two, again) = results(ran, method, 1), results(ran, method, 2)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}")
    if method == "learned_scale":
        assert one["terms.scale.loss.scale"] != 0.5
    assert again == pytest.approx(metrics, abs=1e-6)
