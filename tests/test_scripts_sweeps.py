"""A sweep goes on when a job fails and ends with a table; a run that worked ends with status 0."""

import json
import re
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from cleave.scripts.assembly import outcome
from cleave.scripts.assembly.starting import sweeps

from .training_helpers import PLAIN, load, python_path, run_script, script, small

SHORT = [*PLAIN, *small("PlainNet"), "+trainer.limit_train_batches=2", "trainer.max_epochs=1", "test=false"]
# As joblib's and submitit's launchers do, it hands jobs over as bytes that another process could read.
LAUNCHER = """
import cloudpickle
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore


class ByBytes(BasicLauncher):
    def launch(self, job_overrides, initial_job_idx):
        self.task_function = cloudpickle.loads(cloudpickle.dumps(self.task_function))
        return cloudpickle.loads(cloudpickle.dumps(super().launch(job_overrides, initial_job_idx)))


ConfigStore.instance().store(
    group="hydra/launcher", name="by_bytes", node={"_target_": "hydra_plugins.by_bytes.ByBytes"}, provider="tests"
)
"""


@pytest.fixture
def launcher(tmp_path) -> list[str]:
    pytest.importorskip("cloudpickle")
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/by_bytes.py").write_text(LAUNCHER)
    return ["hydra/launcher=by_bytes"]


def test_a_sweep_goes_on_behind_a_failed_job_with_any_launcher_and_ends_with_a_table(tmp_path, launcher):
    poison = ["+callbacks.poison._target_=training_helpers.PoisonAt", "+callbacks.poison.step=1,9"]
    overrides = ["-m", *SHORT, *launcher, *poison, "data.batch_size=0,16", f"hydra.sweep.dir={tmp_path}/sweep"]
    path = python_path(Path(__file__).parent, tmp_path)
    result = script("train", *overrides, "hydra.sweeper.max_batch_size=1", cwd=tmp_path, PYTHONPATH=path)
    told = result.stdout + result.stderr
    assert result.returncode == 1, told
    assert "Traceback" not in told
    assert "3 of 4 jobs failed" in told
    assert "Job 0 failed: ValueError: batch_size must be" in told  # the first one, and the others ran
    rows = re.findall(r"│ (\d) +│ +(.*?) │ +(.*?) │", told)
    assert [number for number, *_ in rows] == ["0", "1", "2", "3"]
    assert rows[0][1] == "+callbacks.poison.step=1 data.batch_size=0"
    assert rows[0][2].startswith("failed: ValueError: batch_size must be")
    assert rows[1][2].startswith("failed: ")  # a loss that is not finite
    best = load(tmp_path / "sweep/3/checkpoints/best.ckpt")
    score = next(state["best_model_score"] for name, state in best["callbacks"].items() if "BestCheckpoint" in name)
    assert float(rows[3][2]) == pytest.approx(float(score), rel=1e-3)
    assert "Traceback" in (tmp_path / "sweep/1/error.txt").read_text()


def job(folder: Path, sweeper: str, status: JobStatus, value: object) -> JobReturn:
    hydra = {
        "mode": RunMode.MULTIRUN,
        "job": {"num": 4},
        "sweeper": {"_target_": sweeper},
        "runtime": {"output_dir": str(folder)},
    }
    returned = JobReturn(overrides=["seed=4"], status=status)
    returned.return_value = value
    sweeps.Sweep().on_job_end(OmegaConf.create({"hydra": hydra}), returned)
    return returned


def test_a_sweeper_that_chooses_learns_of_a_failed_job(tmp_path):
    failed = sweeps.FailedJob("ValueError: no")
    returned = job(tmp_path, "my.Sweeper", JobStatus.FAILED, failed)
    assert returned.status == JobStatus.FAILED
    assert json.loads((tmp_path / sweeps.RECORD).read_text())["error"] == "ValueError: no"
    returned = job(tmp_path, sweeps._CHOOSES_NOTHING, JobStatus.FAILED, failed)
    assert (returned.status, returned.return_value) == (JobStatus.COMPLETED, None)
    job(tmp_path, "my.Sweeper", JobStatus.COMPLETED, 0.5)
    record = json.loads((tmp_path / sweeps.RECORD).read_text())
    assert record == {"number": 4, "overrides": ["seed=4"], "metric": 0.5, "error": None}


def test_a_table_without_a_failure_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps.Sweep, "folder", tmp_path)
    for number, value in enumerate((0.5, None)):
        record = {"number": number, "overrides": ["a=1", f"seed={number}"], "metric": value, "error": None}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / sweeps.RECORD).write_text(json.dumps(record))
    assert not sweeps.told()
    told = capsys.readouterr().out
    assert re.search(r"0 +│ +seed=0 │ +0\.5 ", told)
    assert re.search(r"1 +│ +seed=1 │ +not measured ", told)


# --- exit statuses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        (["+trainer.max_steps=2", "+trainer.limit_train_batches=5"], True),
        pytest.param(["+trainer.limit_val_batches=0"], True, marks=pytest.mark.slow),
        pytest.param(["trainer.check_val_every_n_epoch=5"], True, marks=pytest.mark.slow),
        (["+trainer.fast_dev_run=true", "optimized_metric=val/other"], False),
    ],
)
def test_a_run_that_measured_no_metric_ends_with_status_0_and_a_word(settings, trained, tmp_path):
    base = [each for each in SHORT if "limit_train" not in each]
    base += [] if any("limit_train" in each for each in settings) else ["+trainer.limit_train_batches=2"]
    told = run_script("train", *base, *settings, folder=tmp_path / "run")
    assert "was not measured" in told
    if trained:
        assert "optimized_metric=val/acc was not measured, as no validation ended" in told
        assert f"Checkpoint: {tmp_path}/run/checkpoints/last.ckpt" in told


def test_only_a_sweep_that_chooses_by_a_metric_refuses_to_do_without(monkeypatch):
    cfg = OmegaConf.create({"optimized_metric": "val/acq", "train": True})
    assert outcome.returned(cfg, {"val/acc": 0.5}) is None
    monkeypatch.setattr(outcome, "chooses", lambda: True)
    with pytest.raises(ValueError, match=r"val/acq was not measured; measured were val/acc\. Did you mean 'val/acc'"):
        outcome.returned(cfg, {"val/acc": 0.5})
    assert outcome.returned(cfg, {"val/acq": 0.5}) == 0.5
