"""SIGTERM and Ctrl-C end every command with their status, keep what was trained, and say how to go on."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cleave.scripts.assembly.starting.stopping import going_on

from .training_helpers import DIGITS, FINAL, PLAIN, ROOT, differences, load, python_path, run_script, small

RUN = [*PLAIN, *FINAL, *small("DropoutNet"), *DIGITS, "trainer.max_epochs=2", "data.augment=crop"]
BATCHES = 6
RUN += [f"+trainer.limit_train_batches={BATCHES}", "+trainer.limit_val_batches=2", "+trainer.limit_test_batches=2"]
STATUS = {"SIGTERM": 143, "SIGINT": 130}


def signalled(name: str, **settings: object) -> list[str]:
    chosen = {"_target_": "training_helpers.SignalAt", "name": name} | settings
    return [f"+callbacks.signal.{key}={value}" for key, value in chosen.items()]


def command_of(told: str) -> list[str]:
    (line,) = [line for line in told.splitlines() if line.startswith("Go on: ")]
    return shlex.split(line.removeprefix("Go on: "))


def started(*command: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": python_path(ROOT / "tests"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_script("train", *RUN, folder=folder)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "SIGTERM")) for name in STATUS]
)
def test_training_ends_with_its_status_and_the_printed_command_goes_on_exactly(name, whole, tmp_path):
    folder = tmp_path / "a run"
    how = signalled(name, step=3)
    told = run_script("train", *RUN, *how, folder=folder, code=STATUS[name])
    last = folder / "checkpoints/last.ckpt"
    assert f"Stopped by {'Ctrl-C' if name == 'SIGINT' else name}." in told
    assert f"What was trained is kept in {last}" in told
    assert "Traceback" not in told
    assert (load(last)["epoch"], load(last)["global_step"]) == (0, 4)
    _, *command = command_of(told)
    assert f"ckpt_path='{last}'".replace("a run's", r"a run\'s") in command
    resumed = started(sys.executable, *command, folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    finals = [load(each / "final.ckpt") for each in (whole, folder)]
    assert differences(*({k: v for k, v in f.items() if k not in ("cleave", "callbacks")} for f in finals)) == []


@pytest.mark.parametrize(
    "path", ["/a/b.ckpt", "/a b/c=d,e.ckpt", "/it's/a.ckpt", r"/a\'b\\'c/{x}[y].ckpt", "/ü/$HOME.ckpt"]
)
def test_whatever_a_path_holds_the_command_names_it(path):
    word = shlex.split(going_on(path))[-1]
    override = OverridesParser.create().parse_override(word)
    assert (override.key_or_group, override.value()) == ("ckpt_path", path)


def test_a_signal_in_the_validation_of_an_epoch_ends_behind_it(tmp_path):
    folder = tmp_path / "run"
    told = run_script("train", *RUN, *signalled("SIGTERM", stage="validate"), folder=folder, code=143)
    last = load(folder / "checkpoints/last.ckpt")
    assert "Go on: python" in told
    assert (last["epoch"], last["global_step"]) == (0, BATCHES)
    assert float(last["resuming"]["measured"]["val/acc"]) >= 0


@pytest.mark.parametrize("name", STATUS)
def test_a_second_signal_ends_at_once(name, tmp_path):
    told = run_script("train", *RUN, *signalled(name, times=2), folder=tmp_path / "run", code=STATUS[name])
    assert "a second" in told
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_a_signal_while_testing_says_what_was_trained(tmp_path):
    folder = tmp_path / "run"
    told = run_script("train", *RUN, *signalled("SIGTERM", stage="test"), folder=folder, code=143)
    assert f"What was trained is kept in {folder}/checkpoints/last.ckpt" in told
    assert "Traceback" not in told


def test_without_last_checkpoints_the_status_is_the_same(tmp_path):
    told = run_script("train", *RUN, "callbacks.last=null", *signalled("SIGTERM"), folder=tmp_path / "run", code=143)
    assert "Nothing of it was saved." in told


@pytest.mark.parametrize("name", STATUS)
def test_a_checkpoint_that_is_evaluated_stays_as_it_was(name, teacher_file, tmp_path):
    how = "{_target_: training_helpers.SignalAt, name: " + name + ", stage: test}"
    overrides = [f"ckpt_path={teacher_file}", "trainer=cpu", f"+trainer.callbacks=[{how}]"]
    told = run_script("evaluate", *overrides, folder=tmp_path / "run", code=STATUS[name])
    assert "what it reads is as it was, and the same command starts it again" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("name", "status"), STATUS.items())
def test_every_command_ends_so_whatever_it_is_doing(name, status, tmp_path):
    code = f"""
import os, signal
from cleave.scripts.assembly.starting.terminal import start
def main():
    try:
        os.kill(os.getpid(), signal.{name})
    except Exception:
        raise SystemExit(3)
    raise SystemExit(4)
start(main)
"""
    process = started(sys.executable, "-c", code, folder=tmp_path)
    assert (process.returncode, process.stdout) == (status, "")
    assert process.stderr.startswith("Stopped by ")
    for script in (ROOT / "scripts").glob("[a-z]*.py"):
        started_by = ("start(main)", f'run("{script.stem}")')
        assert any(line in script.read_text() for line in started_by), f"{script} has a start of its own"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "parent"), [("ddp_spawn", False), ("ddp_spawn", True), ("ddp", False)])
def test_of_several_processes_one_speaks_and_all_end(strategy, parent, tmp_path):
    overrides = [*RUN, "trainer=ddp_sim", f"trainer.strategy={strategy}", *signalled("SIGTERM", parent=parent)]
    told = run_script("train", *overrides, folder=tmp_path / "run", code=143, fresh=True)
    assert told.count("Stopped by SIGTERM") == 1
    saved = load(tmp_path / "run/checkpoints/last.ckpt")["global_step"]
    assert saved >= 5 if parent else saved == 5


@pytest.mark.slow
def test_a_job_that_slurm_requeues_goes_on_in_its_folder(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(f"#!/bin/sh\necho $* > {tmp_path}/scontrol\n")
    (tmp_path / "bin/scontrol").chmod(0o755)
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "cleave", "SLURM_NTASKS_PER_NODE": "1"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    slurm["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    command = [sys.executable, str(ROOT / "scripts/train.py"), *RUN, f"hydra.run.dir={tmp_path}/run"]
    ends = [each.replace("callbacks.signal", "callbacks.end") for each in signalled("SIGTERM", step=4)]
    first = started(*command, *signalled("SIGUSR1", step=3), *ends, folder=tmp_path, **slurm)
    assert first.returncode == 143, first.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 1234\n"
    assert list((tmp_path / "run/checkpoints").glob("hpc_ckpt_*.ckpt"))
    again = started(*command, folder=tmp_path, **slurm, SLURM_RESTART_COUNT="1")
    assert again.returncode == 0, again.stderr
    assert load(tmp_path / "run/final.ckpt")["global_step"] == 2 * BATCHES
    assert not list((tmp_path / "run").rglob("hpc_ckpt_*.ckpt"))
    lost = started(*command[:-1], f"hydra.run.dir={tmp_path}/other", folder=tmp_path, **slurm, SLURM_RESTART_COUNT="1")
    assert "holds nothing to go on from" in lost.stderr
