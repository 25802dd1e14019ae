"""Offline W&B runs of the scripts, read back from their own files; every script runs as a user would run it."""

import base64
import csv
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import wandb
from omegaconf import OmegaConf

from cleave.lightning_modules.checkpoints.loading import read_checkpoint
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import Restored, restore, restore_data
from cleave.scripts.assembly.starting.terminal import CONF
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.train import train

from .offline_run import OfflineRun, offline_runs
from .training_helpers import python_path

ROOT = Path(CONF).parent
QUICK = ["trainer=cpu", "debug=limit", "logger=wandb", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]
CALLBACKS = '''
import os, signal
from pytorch_lightning import Callback

class Crash(Callback):
    """Fails in the second epoch of the run with seed 1."""
    def __init__(self, seed): self.seed = seed
    def on_train_batch_end(self, trainer, *args):
        if self.seed == 1 and trainer.current_epoch == 1:
            raise RuntimeError("the second epoch went wrong")

class Interrupt(Callback):
    """Types Ctrl-C: the terminal sends the signal to every process of the group."""
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            os.killpg(0, signal.SIGINT)
'''


def run_script(script: str, overrides: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "code").mkdir(exist_ok=True, parents=True)
    (folder / "code/misbehaving.py").write_text(CALLBACKS)
    own = {f"WANDB_{kind}_DIR": str(folder / "wandb") for kind in ("CACHE", "CONFIG", "DATA")}
    own |= {
        "PYTHONPATH": python_path(folder / "code"),
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, str(ROOT / f"scripts/{script}.py"), *overrides, f"paths.log_dir={folder / 'logs'}"],
        env=inherited | own | env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        start_new_session=True,
        check=False,
    )


class Tracked(NamedTuple):
    """A training process, the one run it left, the folder of its outputs, and the network in its best checkpoint."""

    process: subprocess.CompletedProcess[str]
    run: OfflineRun
    outputs: Path
    restored: Restored


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> Tracked:
    folder = tmp_path_factory.mktemp("tracked")
    overrides = ["experiment=digits_hnd", f"base.ckpt_path={teacher_file}", *QUICK, "export=true", "seed=0"]
    overrides += ["tags=[first,second]", "logger.wandb.group=ours", "trainer.log_every_n_steps=1"]
    process = run_script("train", overrides, folder)
    assert process.returncode == 0, process.stderr
    (run,) = offline_runs(folder / "logs")
    outputs = run.folder.parent.parent
    return Tracked(process, run, outputs, restore(outputs / "checkpoints/best.ckpt"))


def digests(path: Path) -> dict[str, str]:
    """Base64 md5 of a file, or of each file of a folder: what W&B names contents by."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    root = path.parent if path.is_file() else path
    return {str(p.relative_to(root)): base64.b64encode(hashlib.md5(p.read_bytes()).digest()).decode() for p in files}


def contents(artifact) -> dict[str, str]:
    return {entry.path: entry.digest for entry in artifact.manifest.contents}


def test_the_resolved_config_is_logged_once_and_nested(trained):
    written = read_checkpoint(trained.outputs / "checkpoints/best.ckpt")["cleave"]["config"]
    config = {k: v for k, v in trained.run.config.items() if k not in ("_wandb", "cost")}
    assert config == written
    assert (config["seed"], config["data"]["image_size"], config["codec"]["bits"]) == (0, 8, 4)
    assert "${" not in json.dumps(config)


def test_tags_group_and_project_reach_the_run(trained):
    run = trained.run.run
    assert list(run.tags) == ["first", "second"]
    assert (run.run_group, run.project, run.job_type) == ("ours", "cleave", "debug")


def test_parameters_and_macs_of_every_part_are_logged(trained):
    network = trained.restored.network
    cost = dict(trained.run.config["cost"])
    assert cost.pop("trainable_params") == sum(p.numel() for p in network.bottlenecks["layer2"].parameters())
    assert cost == {f"{part.kind}/{part.name}": {"macs": part.macs, "params": part.params} for part in network.costs()}
    assert list(cost) == ["encoder/layer2", "decoder/layer2", "stage/final"]


def test_metrics_carry_their_names_and_values(trained):
    assert len(trained.run.series("train/loss")) == 6  # two epochs of three steps
    assert len(trained.run.series("val/acc")) == 2
    assert all(math.isfinite(value) for value in trained.run.series("train/loss"))
    assert len(trained.run.series("test/acc")) == 1
    assert trained.run.summary["test/acc"] == trained.run.series("test/acc")[-1]
    manifest = json.loads((trained.outputs / "bundle/manifest.json").read_text())
    assert manifest["metrics"]["test/acc"] == pytest.approx(trained.run.summary["test/acc"])
    assert any(name.startswith("lr-") for row in trained.run.history for name in row)


def test_the_best_checkpoint_is_an_artifact(trained):
    artifact = trained.run.artifacts["checkpoint"]
    assert (artifact.type, sorted(artifact.aliases)) == ("model", ["best", "latest"])
    assert contents(artifact) == digests(trained.outputs / "checkpoints/best.ckpt")
    metadata = json.loads(artifact.metadata)
    assert metadata == {"monitor": "val/acc", "score": pytest.approx(max(trained.run.series("val/acc")))}


def test_the_bundle_is_an_artifact(trained):
    artifact = trained.run.artifacts["bundle"]
    assert artifact.type == "bundle"
    assert contents(artifact) == digests(trained.outputs / "bundle")
    assert "manifest.json" in contents(artifact)


def test_sample_predictions_are_a_table_of_what_the_best_checkpoint_says(trained):
    (entry,) = trained.run.series("test/predictions")
    table = json.loads((trained.run.folder / "files" / entry["path"]).read_text())
    assert table["columns"] == ["image", "label", "prediction", "confidence", "correct"]
    restored = trained.restored
    batch = restore_data(restored, OmegaConf.create({})).sample_batch("test", 32)
    images, labels = batch["images"], batch["labels"]
    with torch.no_grad():
        confidence, predicted = restored.network(restored.image_input.normalize(images)).softmax(1).max(1)
    assert [row[1] for row in table["data"]] == [restored.class_names[i] for i in labels]
    assert [row[2] for row in table["data"]] == [restored.class_names[i] for i in predicted]
    assert [row[3] for row in table["data"]] == pytest.approx(confidence.tolist(), abs=1e-5)
    assert [row[4] for row in table["data"]] == (labels == predicted).tolist()
    (pictures,) = [contents(a) for a in trained.run.artifacts.values() if a.type == "run_table"]
    distinct = {image.numpy().tobytes() for image in images}
    assert len([path for path in pictures if path.endswith(".png")]) == len(distinct)


def test_a_finished_run_says_so_and_w_and_b_does_not_grumble(trained):
    assert trained.run.exit_codes == [0]
    said = trained.process.stdout + trained.process.stderr
    assert "WARNING" not in said
    assert "Warning:" not in said
    assert "Run history" not in said


def test_export_tracks_its_bundle_its_predictions_and_what_was_trained(trained, tmp_path, monkeypatch):
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb-own"))
    checkpoint = trained.outputs / "checkpoints/best.ckpt"
    overrides = [f"ckpt_path={checkpoint}", "trainer=cpu", "logger=wandb", "logger.wandb.mode=offline"]
    overrides += ["+trainer.limit_test_batches=1", "+trainer.enable_progress_bar=false"]
    export(compose_config("export", overrides, tmp_path))
    (run,) = offline_runs(tmp_path)
    assert run.exit_codes == [0]
    assert contents(run.artifacts["bundle"]) == digests(tmp_path / "bundle")
    assert run.config["ckpt_path"] == str(checkpoint)
    assert run.config["trained"]["codec"]["bits"] == 4
    assert len(run.series("test/acc")) == 1
    assert run.series("test/predictions")[0]["nrows"] == 32
    assert run.run.job_type == "export"


def test_what_runs_in_one_process_is_tracked_as_runs_of_its_own(tmp_path, monkeypatch):
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb-own"))
    tracked = ["trainer=cpu", "logger=wandb", "logger.wandb.mode=offline", "+trainer.enable_progress_bar=false"]
    tiny = [*tracked, "experiment=digits_teacher", "debug=limit", "callbacks.progress=null", "trainer.max_epochs=1"]
    train(compose_config("train", [*tiny, "seed=1"], tmp_path / "1"))
    crash = ["+callbacks.crash._target_=misbehaving.Crash", "+callbacks.crash.seed=1", "trainer.max_epochs=2"]
    (tmp_path / "misbehaving.py").write_text(CALLBACKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="the second epoch went wrong"):
        train(compose_config("train", [*tiny, *crash, "seed=2"], tmp_path / "2"))
    checkpoint = tmp_path / "1/checkpoints/best.ckpt"
    evaluate(compose_config("evaluate", [*tracked, f"ckpt_path={checkpoint}", "split=val"], tmp_path / "3"))
    runs = [run for folder in "123" for run in offline_runs(tmp_path / folder)]
    assert [run.run.job_type for run in runs] == ["debug", "debug", "evaluate"]
    assert [run.exit_codes for run in runs] == [[0], [1], [0]]
    assert [run.config.get("seed") for run in runs] == [1, 2, None]
    assert [len(run.series("test/acc")) for run in runs] == [1, 0, 0]
    assert wandb.run is None


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_wandb_run_unless_told_otherwise(tmp_path, monkeypatch):
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb-own"))
    quick = ["trainer=cpu", "+trainer.enable_progress_bar=false", "experiment=digits_teacher", "debug=limit"]
    quick += ["callbacks.progress=null"]
    tracked, untracked = ["logger=wandb", "logger.wandb.mode=offline"], ["logger=csv"]
    again = ["logger.wandb.resume=false"]
    plan = [(tracked, None), (untracked, 0), (tracked, 1), (tracked + again, 0), ([*tracked, "train=false"], 0)]
    for number, (logger, after) in enumerate(plan):
        resume = [] if after is None else [f"ckpt_path={tmp_path}/{after}/checkpoints/last.ckpt"]
        epochs = f"trainer.max_epochs={number + 1}"
        train(compose_config("train", [*quick, *logger, *resume, epochs, "test=false"], tmp_path / str(number)))
    runs = {folder: [run.run.run_id for run in offline_runs(tmp_path / folder)] for folder in "01234"}
    first = runs["0"]
    assert len(first) == 1
    assert (runs["1"], runs["2"]) == ([], first)
    assert len(runs["3"]) == len(runs["4"]) == 1
    assert first != runs["3"] != runs["4"] != first
    kept = [read_checkpoint(tmp_path / f"{folder}/checkpoints/last.ckpt")["cleave"]["wandb_id"] for folder in "0123"]
    assert kept == [*first * 3, *runs["3"]]


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_the_log_of_a_resumed_run_leaves_what_is_there(logger, tmp_path):
    quick = ["trainer=cpu", "+trainer.enable_progress_bar=false", "experiment=digits_teacher", "debug=limit"]
    quick += ["callbacks.progress=null", "test=false", f"logger={logger}", f"+logger.{logger}.version=0"]
    train(compose_config("train", [*quick, "trainer.max_epochs=1"], tmp_path / "run"))
    second = int(time.time())  # TensorBoard names a file after it
    before = {path: path.read_bytes() for path in (tmp_path / "run" / logger).rglob("*") if path.is_file()}
    last = f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"
    while logger == "tensorboard" and int(time.time()) == second:
        time.sleep(0.05)
    train(compose_config("train", [*quick, "trainer.max_epochs=2", last], tmp_path / "run"))
    for path, text in before.items():
        if path.suffix != ".yaml":
            assert path.read_bytes().startswith(text)
    if logger == "csv":
        (file,) = (tmp_path / "run").rglob("metrics.csv")
        rows = list(csv.DictReader(file.read_text().splitlines()))
        assert [row["epoch"] for row in rows if row["val/acc"]] == ["0", "1"]


@pytest.mark.slow
def test_each_job_of_a_sweep_is_its_own_run_and_a_crash_is_recorded_as_one(tmp_path):
    overrides = ["-m", "seed=0,1", "experiment=digits_teacher", *QUICK, "test=false"]
    overrides += ["+callbacks.crash._target_=misbehaving.Crash", "+callbacks.crash.seed=${seed}"]
    process = run_script("train", overrides, tmp_path)
    assert process.returncode == 1
    assert "the second epoch went wrong" in process.stderr
    finished, crashed = offline_runs(tmp_path / "logs")
    assert finished.run.run_id != crashed.run.run_id
    assert (finished.config["seed"], finished.exit_codes) == (0, [0])
    assert (crashed.config["seed"], crashed.exit_codes) == (1, [1])
    assert (len(finished.series("val/acc")), len(crashed.series("val/acc"))) == (2, 1)
    assert "checkpoint" in finished.artifacts
    assert "checkpoint" not in crashed.artifacts


@pytest.mark.slow
def test_a_recipe_is_one_run_in_which_its_steps_are_visible(tmp_path, teacher_file):
    overrides = ["experiment=bottlefit", f"base.ckpt_path={teacher_file}", *QUICK, "trainer.log_every_n_steps=1"]
    overrides += ["backbone.name=resnet20", "backbone.in_channels=1", "data.image_size=8", "split.at=layer2"]
    process = run_script("train", [*overrides, "compare={layer2: 1.0, layer3: 0.5}"], tmp_path)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stdout + process.stderr
    (run,) = offline_runs(tmp_path / "logs")
    assert run.exit_codes == [0]
    # Two steps of two epochs of three batches: the loggers' steps go on, epochs start again, every row names its own.
    rows = [
        (row["trainer/global_step"], row["recipe_step"], row["epoch"]) for row in run.history if "train/loss" in row
    ]
    assert rows == [(step, 1 + step // 6, step % 6 // 3) for step in range(12)]
    steps = [row["trainer/global_step"] for row in run.history if "trainer/global_step" in row]
    assert steps == sorted(steps)
    assert [row["recipe_step"] for row in run.history if "val/acc" in row] == [1, 1, 2, 2]
    assert (len(run.series("train/head/layer2")), len(run.series("test/acc"))) == (6, 1)
    assert list(run.config["steps"]) == ["head", "finetune"]
    trainable = run.config["cost"]["trainable_params"]
    assert list(trainable) == ["head", "finetune"]
    tail = sum(cost["params"] for name, cost in run.config["cost"].items() if name.startswith("stage/"))
    assert trainable["finetune"] - trainable["head"] == tail > 0
    scores = run.series("val/acc")
    for step, best in (("head", max(scores[:2])), ("finetune", max(scores[2:]))):
        assert run.summary[f"steps/{step}/val/acc"] == pytest.approx(best)
        assert run.summary[f"steps/{step}/epochs"] == 2
    assert sorted(run.artifacts["checkpoint"].aliases) == ["best", "finetune", "latest"]
    best = run.folder.parent.parent / "checkpoints/finetune/best.ckpt"
    assert contents(run.artifacts["checkpoint"]) == digests(best)


@pytest.mark.slow
def test_an_interrupted_run_is_recorded_as_failed(tmp_path):
    overrides = ["experiment=digits_teacher", *QUICK, "logger.wandb.mode=offline"]
    overrides += ["+callbacks.interrupt._target_=misbehaving.Interrupt"]
    process = run_script("train", overrides, tmp_path, WANDB_MODE="online")
    assert process.returncode == 130
    assert "Traceback" not in process.stderr
    (run,) = offline_runs(tmp_path / "logs")
    assert run.exit_codes == [130]
    assert run.series("test/acc") == []


@pytest.mark.slow
def test_a_users_mistake_after_the_run_began_is_recorded_as_a_failure(tmp_path):
    overrides = ["experiment=digits_teacher", *QUICK, "training.optimizer.lr=1e30"]
    process = run_script("train", overrides, tmp_path)
    assert process.returncode == 1
    assert "NumberError" in process.stderr
    (run,) = offline_runs(tmp_path / "logs")
    assert run.exit_codes == [1]


@pytest.mark.slow
def test_without_a_login_one_line_says_what_to_do_before_any_training(tmp_path):
    process = run_script(
        "train",
        ["experiment=digits_teacher", *QUICK],
        tmp_path,
        WANDB_MODE="online",
        NETRC=str(tmp_path / "netrc"),
        HOME=str(tmp_path),
    )
    assert process.returncode == 1
    assert "\nConnectionError: W&B could not start the run" in f"\n{process.stderr}"
    assert "logger.wandb.mode=offline" in process.stderr
    assert not list((tmp_path / "logs").rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp"])
def test_under_ddp_rank_zero_alone_has_a_run(tmp_path, strategy):
    overrides = ["experiment=digits_teacher", *QUICK, "trainer=ddp_sim", f"trainer.strategy={strategy}", "export=true"]
    process = run_script("train", overrides, tmp_path)
    assert process.returncode == 0, process.stderr
    (run,) = offline_runs(tmp_path / "logs")
    assert isinstance(run, OfflineRun)
    assert run.exit_codes == [0]
    assert {"checkpoint", "bundle"} <= set(run.artifacts)
    assert len(run.series("val/acc")) == 2
    (table,) = run.series("test/predictions")
    assert (run.folder / "files" / table["path"]).is_file()
