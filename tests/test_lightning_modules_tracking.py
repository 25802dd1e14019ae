"""Tracking where W&B is off, refuses, or belongs to another rank, and how a run's end is recorded."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning import loggers as pl_loggers
from torch import nn

from cleave.datamodules import Digits
from cleave.lightning_modules.callbacks import WandbTracking
from cleave.lightning_modules.callbacks.tracking import WandbLogger, prediction_table, recorded_outcome, wandb_run

from .offline_run import offline_runs


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "own"))


class Untouchable(pl_loggers.WandbLogger):
    @property
    def experiment(self):
        raise AssertionError("only rank zero may start a run")


def trainer_of(*loggers, rank_zero=True):
    return SimpleNamespace(is_global_zero=rank_zero, loggers=list(loggers))


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit(1)])
def test_the_end_of_a_run_is_recorded(tmp_path, error):
    logger = WandbLogger(project="cleave", save_dir=tmp_path, mode="offline")
    with nullcontext() if error is None else pytest.raises(type(error)), recorded_outcome():
        logger.log_metrics({"val/acc": 0.5}, step=1)
        if error is not None:
            raise error
    (run,) = offline_runs(tmp_path)
    assert run.exit_codes == [0 if error is None else 1]
    assert run.series("val/acc") == [0.5]
    assert wandb.run is None


def test_a_run_that_was_open_before_is_left_open(tmp_path):
    with wandb.init(project="cleave", dir=tmp_path, mode="offline") as ours:
        with recorded_outcome():
            wandb.log({"val/acc": 0.5})
        assert wandb.run is ours
    (run,) = offline_runs(tmp_path)
    assert (run.exit_codes, run.series("val/acc")) == ([0], [0.5])


@pytest.mark.parametrize("error", [None, ValueError("known only in the end")])
def test_an_outcome_within_another_is_the_outer_ones(tmp_path, error):
    logger = WandbLogger(project="cleave", save_dir=tmp_path, mode="offline")
    with nullcontext() if error is None else pytest.raises(ValueError, match="known"), recorded_outcome():
        with recorded_outcome():
            logger.log_metrics({"val/acc": 0.5}, step=1)
        assert wandb.run is not None
        if error is not None:
            raise error
    (run,) = offline_runs(tmp_path)
    assert run.exit_codes == [0 if error is None else 1]


def test_recording_an_outcome_without_a_run_does_not_import_wandb(monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb")
    with recorded_outcome():
        pass
    assert "wandb" not in sys.modules


def test_other_ranks_and_other_loggers_have_no_run(tmp_path):
    assert wandb_run(trainer_of(Untouchable(save_dir=tmp_path), rank_zero=False)) is None
    assert wandb_run(trainer_of(pl_loggers.CSVLogger(tmp_path))) is None
    assert wandb_run(trainer_of()) is None


def test_the_run_is_found_behind_another_logger(tmp_path):
    logger = WandbLogger(project="cleave", save_dir=tmp_path, mode="offline")
    with recorded_outcome():
        run = wandb_run(trainer_of(pl_loggers.CSVLogger(tmp_path), logger))
        assert run is wandb.run
        assert run.project == "cleave"


class Constant(pl.LightningModule):
    """Says class 3 of everything, more surely the brighter the image."""

    class_names = tuple("abcdefghij")

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        assert images.dtype == self.scale.dtype
        return nn.functional.one_hot(torch.tensor(3), 10) * self.scale * images.mean((1, 2, 3)).unsqueeze(1).exp()

    def test_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_prediction_table_holds_at_every_precision(precision):
    data = Digits(image_size=8)
    trainer = pl.Trainer(accelerator="cpu", precision=precision, logger=False)
    task = Constant().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    table = prediction_table(SimpleNamespace(datamodule=data, precision_plugin=trainer.precision_plugin), task, 7)
    images, labels = data.sample_batch("test", 7).values()
    assert [row[1] for row in table.data] == [data.class_names[i] for i in labels]
    assert [row[2] for row in table.data] == [data.class_names[3]] * 7
    assert [row[4] for row in table.data] == (labels == 3).tolist()
    logits = data.input.normalize(images).mean((1, 2, 3)).exp()
    sure = logits.exp() / (logits.exp() + 9)
    assert [row[3] for row in table.data] == pytest.approx(sure.tolist(), rel=2e-2)
    assert (table.data[0][0].image.size, table.data[0][0].image.mode) == ((8, 8), "L")


def test_a_disabled_run_is_none_and_nothing_is_written(tmp_path):
    logger = WandbLogger(project="cleave", save_dir=tmp_path, mode="disabled")
    trainer = pl.Trainer(accelerator="cpu", logger=logger, callbacks=[WandbTracking()], enable_progress_bar=False)
    with recorded_outcome():
        logger.log_hyperparams({"seed": 0})
        assert wandb_run(trainer) is None
        trainer.test(Constant(), datamodule=Digits(image_size=8), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_login_says_what_to_do(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConnectionError, match=r"no API key configured .*wandb login.*logger\.wandb\.mode=offline"):
        _ = WandbLogger(project="cleave", save_dir=tmp_path).experiment


def test_no_setting_is_passed_that_w_and_b_dropped(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(wandb, "init", lambda **kwargs: given.update(kwargs))
    _ = WandbLogger(project="cleave", save_dir=tmp_path, tags=["a"], group="g").experiment
    assert "anonymous" not in given
    assert (given["tags"], given["group"], given["project"], given["dir"]) == (["a"], "g", "cleave", str(tmp_path))


def test_a_negative_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="predictions must be 0 or a number of rows, got -1"):
        WandbTracking(predictions=-1)
