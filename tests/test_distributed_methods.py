"""Two processes with half the batch each train what one process with the whole batch trains, whatever the method."""

import json
import os
import subprocess
import sys

import pytest
import torch

from .training_helpers import ROOT


def run(method, processes, folder):
    command = [sys.executable, str(ROOT / "tests/distributed_methods.py"), method, str(processes), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    state = torch.load(folder / f"{processes}.pt", weights_only=True)
    return state, json.loads((folder / f"{processes}.json").read_text())


@pytest.mark.parametrize("method", ["cross_entropy", "head_distillation", "joint_exits", "learned_scale"])
def test_two_processes_equal_one(method, tmp_path):
    (one, metrics), (two, again) = run(method, 1, tmp_path), run(method, 2, tmp_path)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}")
    if method == "learned_scale":
        assert one["terms.scale.loss.scale"] != 0.5
    assert again == pytest.approx(metrics, abs=1e-6)
