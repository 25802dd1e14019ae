"""What the config's extras do around a run, settings of one machine, and presets that people look for."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from hydra.utils import instantiate

from cleave.lightning_modules.callbacks import BestCheckpoint
from cleave.reports.terminal import console
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.starting.extras import apply_extras
from cleave.scripts.assembly.starting.terminal import CONF
from cleave.scripts.train import train

from .training_helpers import DIGITS, PLAIN, script

COMMANDS = sorted(path.stem for path in Path(CONF).glob("*.yaml"))


def composed(tmp_path, *overrides, name="train"):
    return compose_config(name, overrides, tmp_path)


def test_warnings_are_ignored_where_asked(tmp_path):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        apply_extras(composed(tmp_path))
        warnings.warn("first", UserWarning, stacklevel=1)
        apply_extras(composed(tmp_path, "extras.ignore_warnings=true"))
        warnings.warn("second", UserWarning, stacklevel=1)
    assert [str(each.message) for each in heard] == ["first"]


@pytest.mark.parametrize("tags", ["tags=[dev]", "tags=[]", "tags=null"])
def test_a_run_without_tags_of_its_own_is_refused_where_they_are_enforced(tags, tmp_path):
    apply_extras(composed(tmp_path, tags))
    with pytest.raises(ValueError, match=r"enforce_tags=true, but tags=\[.*\] says nothing of this run; add 'tags="):
        apply_extras(composed(tmp_path, tags, "extras.enforce_tags=true"))


@pytest.mark.parametrize("given", ["tags=[mine]", "tags=[dev,mine]", "experiment=digits_teacher"])
def test_tags_of_a_run_or_of_its_experiment_will_do(given, tmp_path):
    apply_extras(composed(tmp_path, "extras.enforce_tags=true", given))


def test_the_config_is_printed_resolved(tmp_path):
    with console.capture() as capture:
        apply_extras(composed(tmp_path, "extras.print_config=true", "seed=42"))
    told = capture.get()
    assert "\n  seed: 42" in told  # of the data, which takes it from the run's
    assert "${seed}" not in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("+extras.print=true", r"extras\.print has no meaning; there are ignore_warnings, enforce_tags, print_config"),
        ("extras.print_config=1", r"extras\.print_config must be true or false, got 1"),
    ],
)
def test_extras_that_mean_nothing_are_refused(given, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        apply_extras(composed(tmp_path, given))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_extras(name, tmp_path):
    assert set(composed(tmp_path, name=name).extras) == {"ignore_warnings", "enforce_tags", "print_config"}


def test_a_command_heeds_them_before_anything_is_built(tmp_path):
    result = script("evaluate", "ckpt_path=nowhere.ckpt", "extras.enforce_tags=true", cwd=tmp_path)
    assert result.returncode == 1
    assert "extras.enforce_tags=true" in result.stderr


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_settings_of_a_machine_are_read_where_they_are(name, tmp_path):
    (tmp_path / "conf/local").mkdir(parents=True)
    settings = "# @package _global_\npaths: {log_dir: /machine/logs}\n"
    (tmp_path / "conf/local/default.yaml").write_text(settings)
    words = ["--config-dir", "conf", "--cfg", "job", "--package", "paths"]
    assert "log_dir: /machine/logs\n" in script(name, *words, cwd=tmp_path).stdout
    stands_over = script(name, *words, "paths.log_dir=given", cwd=tmp_path)
    assert "log_dir: given\n" in stands_over.stdout


def test_git_ignores_the_settings_of_a_machine_and_keeps_their_example():
    ignored = (Path(CONF).parent / ".gitignore").read_text().splitlines()
    assert "/conf/local/default.yaml" in ignored
    assert (Path(CONF) / "local/example.yaml").is_file()


def test_the_best_few_checkpoints_are_kept(tmp_path):
    few = ["+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "trainer.max_epochs=4", "test=false"]
    given = ["callbacks=topk", *PLAIN, *DIGITS, *few, "callbacks.topk.save_top_k=2"]
    train(composed(tmp_path, *given))
    kept = sorted(path.name for path in (tmp_path / "checkpoints/top").iterdir())
    assert len(kept) == 2
    assert all(name.startswith("epoch=00") for name in kept)
    assert (tmp_path / "checkpoints/best.ckpt").is_file()


def test_presets_for_a_mac_and_for_mlflow_compose(tmp_path):
    cfg = composed(tmp_path, "trainer=mps", "logger=mlflow", "callbacks=topk")
    assert (cfg.trainer.accelerator, cfg.trainer.devices) == ("mps", 1)
    assert cfg.logger.mlflow.tracking_uri == "sqlite:///logs/mlflow.db"
    cfg.callbacks.topk.monitor = "val/acc"
    assert isinstance(instantiate(cfg.callbacks.topk), BestCheckpoint)


def test_mlflow_keeps_metrics_and_the_config(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    few = ["+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "trainer.max_epochs=1", "test=false"]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    given = [*PLAIN, *DIGITS, *few, "logger=mlflow", f"logger.mlflow.tracking_uri={store}"]
    train(composed(tmp_path, *given))
    (run,) = mlflow.MlflowClient(store).search_runs(["1"])
    assert "val/acc" in run.data.metrics
    assert run.data.params["trainer/max_epochs"] == "1"
