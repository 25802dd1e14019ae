"""Whatever a user sets on the trainer or on Hydra does something, or is refused in a sentence."""

import re
from pathlib import Path

import pytest

from cleave.scripts.assembly.building import compose_config
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.train import train

from .training_helpers import PLAIN, run_script, small

FEW = ["+trainer.limit_train_batches=3", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"]
RUN = [*PLAIN, *small("PlainNet"), *FEW, "trainer.max_epochs=2"]
SAID = "`Trainer.fit` stopped: `max_epochs=2` reached."


def log_file(folder: Path) -> str:
    return (folder / "train.log").read_text()


def test_what_lightning_says_goes_to_the_log_file_and_reports_to_the_terminal(tmp_path):
    asked = ["trainer.profiler=simple", "trainer.enable_model_summary=true", "callbacks=early_stopping"]
    asked += ["callbacks.progress=null", "+callbacks.early_stopping.verbose=true"]
    told = run_script("train", *RUN, *asked, folder=tmp_path / "run")
    assert SAID not in told
    assert SAID in log_file(tmp_path / "run")
    for stage in ("FIT", "TEST"):
        assert f"{stage} Profiler Report" in told
    assert re.search(r"run_training_batch\s*\|", told)
    assert "Metric val/acc improved" in told
    assert "Trainable params" in told


@pytest.mark.parametrize("verbose", ["true", "pytorch_lightning", "[pytorch_lightning,lightning_fabric]"])
def test_verbose_brings_it_to_the_terminal(verbose, tmp_path):
    told = run_script("train", *RUN, f"hydra.verbose={verbose}", "test=false", folder=tmp_path / "run")
    assert SAID in told
    assert "FitLoop: resetting train dataloader" in told.replace("_FitLoop", "FitLoop")


def test_levels_of_the_job_log_are_obeyed(tmp_path):
    told = run_script("train", *RUN, "hydra.job_logging.root.level=WARNING", "test=false", folder=tmp_path / "run")
    assert SAID not in told
    assert SAID not in log_file(tmp_path / "run")


def test_debug_profiler_prints_where_the_time_goes(tmp_path):
    told = run_script("train", "debug=profiler", *PLAIN, *small("PlainNet"), folder=tmp_path / "run")
    assert "FIT Profiler Report" in told


def test_training_ends_when_its_time_is_up(tmp_path):
    told = run_script("train", *RUN, "trainer.max_epochs=100000", "trainer.max_time=00:00:00:02", folder=tmp_path / "r")
    assert "Time limit reached" in told
    assert (tmp_path / "r/checkpoints/last.ckpt").exists()


REFUSED = [(train, "train", key) for key in ("logger=true", "callbacks=[]")]
REFUSED += [(evaluate, "evaluate", key) for key in ("logger=true", "enable_checkpointing=true")]
REFUSED += [(export, "export", "callbacks=[]")]


@pytest.mark.parametrize(("command", "name", "setting"), REFUSED)
def test_what_the_commands_set_themselves_is_refused(command, name, setting, tmp_path, teacher_file):
    overrides = ["trainer=cpu", "experiment=digits_teacher" if name == "train" else f"ckpt_path={teacher_file}"]
    with pytest.raises(ValueError, match=rf"trainer\.{setting.partition('=')[0]}=.* would be ignored: "):
        command(compose_config(name, [*overrides, f"+trainer.{setting}"], tmp_path / "run"))
