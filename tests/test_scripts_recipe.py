"""A recipe: steps one after another in one run, each from the best weights of the one before, resumable anywhere."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from cleave.lightning_modules.checkpoints.loading import read_checkpoint
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import missing_values, quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.train import train

from .quick_cases import some_quick
from .training_helpers import DIGITS, PLAIN, ROOT, differences, load, run_script

EPOCHS, BATCHES, EVERY = 2, 4, 3
STEPS = EPOCHS * BATCHES
NET = [*DIGITS, "backbone.name=resnet20", "split.at=layer2", "bottleneck.width=8", "bottleneck.channels=4"]
SHORT = [f"+trainer.limit_train_batches={BATCHES}", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"]
BOTTLEFIT = [*PLAIN, *NET, *SHORT, "experiment=bottlefit", "compare={layer2: 1.0, layer3: 0.5}", "data.augment=crop"]
RUN = [*BOTTLEFIT, f"trainer.max_epochs={EPOCHS}", f"callbacks.last.every_n_train_steps={EVERY}"]
LABEL = "Generalized head distillation → Knowledge distillation"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    quiet()
    monkeypatch.syspath_prepend(str(ROOT / "tests"))


def run(teacher: Path, folder: Path, *overrides: str) -> dict[str, float]:
    return train(compose_config("train", [*RUN, f"base.ckpt_path={teacher}", *overrides], folder))


def point(folder: Path) -> dict[str, Any]:
    (found,) = json.loads((folder / "results.json").read_text())["points"]
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv/version_0/metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_file) -> Path:
    quiet()
    folder = tmp_path_factory.mktemp("whole")
    run(teacher_file, folder, "logger=csv", "trainer.log_every_n_steps=1")
    return folder


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_each_step_has_checkpoints_of_its_own_with_its_own_settings(whole):
    for step, method in (("head", "GeneralizedHeadDistillation"), ("finetune", "KnowledgeDistillation")):
        for name in ("best", "last"):
            config = read_checkpoint(whole / f"checkpoints/{step}/{name}.ckpt")["cleave"]["config"]
            assert (config["step"], " → ".join(config["steps"].values())) == (step, LABEL)
            assert config["method"]["_target_"] == f"cleave.lightning_modules.{method}"


def test_the_steps_of_all_loggers_go_on_and_every_row_names_that_of_the_recipe(whole):
    found = [row for row in rows(whole) if "train/loss" in row]
    trained = [(int(row["step"]), float(row["recipe_step"]), int(row["epoch"])) for row in found]
    assert trained == [(step, 1 + step // STEPS, step % STEPS // BATCHES) for step in range(2 * STEPS)]
    validated = [(int(row["step"]) + 1, float(row["recipe_step"])) for row in rows(whole) if "val/acc" in row]
    assert validated == [(BATCHES * (i + 1), 1 + i // EPOCHS) for i in range(2 * EPOCHS)]
    steps = [int(row["step"]) for row in rows(whole)]
    assert steps == sorted(steps)
    assert [int(row["step"]) for row in rows(whole) if "test/acc" in row] == [2 * STEPS]


def test_what_each_step_came_to_is_logged_once(whole):
    for step, end in (("head", STEPS), ("finetune", 2 * STEPS)):
        (row,) = [row for row in rows(whole) if f"steps/{step}/epochs" in row]
        saved = load(whole / f"checkpoints/{step}/best.ckpt")["callbacks"]
        (score,) = [state["best_model_score"] for state in saved.values() if state.get("monitor") == "val/acc"]
        assert (int(row["step"]), float(row[f"steps/{step}/epochs"])) == (end, EPOCHS)
        assert float(row[f"steps/{step}/val/acc"]) == pytest.approx(float(score))
        assert float(row[f"steps/{step}/seconds"]) > 0


def test_results_tell_the_whole_recipe(whole):
    found = point(whole)
    assert (found["method"], found["epochs"]) == (LABEL, 2 * EPOCHS)
    assert found["checkpoint"] == str(whole / "checkpoints/finetune/best.ckpt")
    seconds = [float(v) for row in rows(whole) for k, v in row.items() if k.endswith("/seconds")]
    assert found["train_seconds"] == pytest.approx(sum(seconds))


def test_what_a_step_does_not_train_stays_and_what_the_next_trains_moves(whole, teacher_file):
    teacher = restore(teacher_file).network.state_dict()
    states = [restore(whole / f"checkpoints/{step}/last.ckpt").network.state_dict() for step in ("head", "finetune")]
    of_the_tail = ("layer3.", "fc.", "linear.")
    tail, head, finetuned = ({n: v for n, v in s.items() if n.startswith(of_the_tail)} for s in (teacher, *states))
    assert tail
    assert differences(tail, head) == []
    assert differences(head, finetuned)


@pytest.mark.parametrize("step", [pytest.param("head", marks=pytest.mark.slow), "finetune"])
def test_any_step_is_evaluated_and_exported_from_its_checkpoint_alone(whole, step, tmp_path):
    checkpoint = [f"ckpt_path={whole}/checkpoints/{step}/best.ckpt", "trainer=cpu", *SHORT[2:]]
    checkpoint.append("+trainer.enable_progress_bar=false")
    found = evaluate(compose_config("evaluate", checkpoint, tmp_path / "evaluate"))
    if step == "finetune":
        assert found["test/acc"] == pytest.approx(point(whole)["accuracy"], abs=1e-6)
    bundle = export(compose_config("export", [*checkpoint, f"bundle={tmp_path}/bundle"], tmp_path / "export"))
    assert (bundle / "manifest.json").is_file()


# --- from step to step ------------------------------------------------------------------------------------------------

STILL = ["+steps.finetune.training.optimizer.lr=0.0", "+steps.finetune.training.optimizer.weight_decay=0.0"]


def parameters(file: Path) -> dict[str, torch.Tensor]:
    network = restore(file).network
    return {name: value.detach() for name, value in network.named_weights()}


@pytest.mark.parametrize(
    "callbacks",
    [[], pytest.param(["callbacks=ema", "callbacks.ema.decay=0.5"], marks=pytest.mark.slow)],
    ids=["best", "averaged"],
)
def test_a_step_starts_from_the_best_weights_of_the_one_before(tmp_path, teacher_file, callbacks):
    worst = ["callbacks.checkpoint.monitor=epoch", "callbacks.checkpoint.mode=min"]  # the first is the best
    run(teacher_file, tmp_path, *callbacks, *worst, *STILL, "test=false")
    head, last, end = (
        parameters(tmp_path / f"checkpoints/{name}.ckpt") for name in ("head/best", "head/last", "finetune/last")
    )
    assert differences(head, last)
    assert load(tmp_path / "checkpoints/head/best.ckpt")["epoch"] == 0
    if callbacks:  # the average of weights that stand still is theirs but for rounding
        for name, value in head.items():
            torch.testing.assert_close(end[name], value)
    else:
        assert differences(head, end) == []


@pytest.mark.slow
def test_without_checkpoints_a_step_starts_from_the_last_weights(tmp_path, teacher_file):
    overrides = ["callbacks.checkpoint=null", "callbacks.last=null", "+trainer.enable_checkpointing=false"]
    metrics = run(teacher_file, tmp_path, *overrides, *STILL)
    assert math.isfinite(metrics["test/acc"])
    assert not list(tmp_path.rglob("*.ckpt"))
    assert (point(tmp_path)["epochs"], point(tmp_path)["checkpoint"]) == (2 * EPOCHS, None)


def test_epochs_optimizer_schedule_and_parts_are_each_steps_own(tmp_path, teacher_file):
    own = [
        "+steps.head.trainer.max_epochs=1",
        "+steps.finetune.training.optimizer={_target_: torch.optim.SGD, lr: 0.01, momentum: 0.9}",
        "+steps.finetune.training.scheduler=null",
        "+steps.finetune.method.train=[decoder,tail]",
    ]
    run(teacher_file, tmp_path, *own, "test=false")
    head, finetune = (load(tmp_path / f"checkpoints/{step}/last.ckpt") for step in ("head", "finetune"))
    assert head["global_step"] == BATCHES
    assert head["lr_schedulers"][0]["T_max"] == BATCHES
    assert finetune["lr_schedulers"] == []
    assert "momentum" in finetune["optimizer_states"][0]["param_groups"][0]
    encoders = [parameters(tmp_path / f"checkpoints/{name}.ckpt") for name in ("head/best", "finetune/last")]
    one, two = ({k: v for k, v in state.items() if k.startswith("at:layer2.bottleneck.encoder.")} for state in encoders)
    assert one
    assert differences(one, two) == []


# --- resuming ---------------------------------------------------------------------------------------------------------

# The step at which the run is killed, and the checkpoint that is then the newest.
KILLED = {
    "inside the first step": (STEPS - 1, "head"),
    "inside the second step": (2 * STEPS - 1, "finetune"),
    "in the second step before its first save": (STEPS + EVERY - 1, "head"),
}


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule and counters are equal, of the best checkpoints too; paths are not."""
    for name in ("head/best", "finetune/best", "finetune/last"):
        a, b = (load(folder / f"checkpoints/{name}.ckpt") for folder in (one, other))
        of_the_folder = ("cleave", "callbacks")
        assert differences(*({k: v for k, v in c.items() if k not in of_the_folder} for c in (a, b))) == [], name
    assert (point(one)["epochs"], point(one)["method"]) == (point(other)["epochs"], point(other)["method"])


@pytest.mark.parametrize("case", some_quick(KILLED, lambda case: case == "inside the second step"))
def test_a_killed_run_ends_as_an_uninterrupted_one(case, whole, tmp_path, teacher_file):
    from training_helpers import KilledError

    killed_at, newest = KILLED[case]
    fail = ["+callbacks.fail._target_=training_helpers.FailAt", f"+callbacks.fail.step={killed_at}"]
    with pytest.raises(KilledError):
        run(teacher_file, tmp_path / "run", *fail)
    resume = f"ckpt_path={tmp_path}/run/checkpoints/{newest}/last.ckpt"
    metrics = run(teacher_file, tmp_path / "run", resume)
    assert_same_end(whole, tmp_path / "run")
    assert metrics["test/acc"] == point(whole)["accuracy"]


def test_a_step_resumed_at_its_end_in_a_new_folder_goes_on_to_the_next(whole, tmp_path, teacher_file, capsys):
    run(teacher_file, tmp_path, f"ckpt_path={whole}/checkpoints/head/last.ckpt", "logger=csv")
    told = capsys.readouterr().out
    assert f"resumed from {whole}/checkpoints/head/last.ckpt" in told
    assert_same_end(whole, tmp_path)
    assert min(int(row["step"]) for row in rows(tmp_path) if "train/loss" in row) >= STEPS


def test_a_run_resumed_in_its_last_step_knows_what_the_others_came_to(whole, tmp_path, teacher_file, capsys):
    run(teacher_file, tmp_path, f"ckpt_path={whole}/checkpoints/finetune/last.ckpt")
    found = point(tmp_path)
    assert (found["method"], found["epochs"]) == (LABEL, 2 * EPOCHS)
    # The step's own seconds are those that had passed when the checkpoint was written.
    assert 0 < found["train_seconds"] <= point(whole)["train_seconds"]
    told = capsys.readouterr().out
    assert "step 1 of 2" not in told
    assert "head: generalized head distillation" in told
    assert not (tmp_path / "checkpoints/head").exists()


@pytest.mark.slow
def test_a_step_that_had_stopped_early_stays_stopped(tmp_path, teacher_file):
    early = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "trainer.max_epochs=9", "test=false"]
    never = ["callbacks.early_stopping.monitor=recipe_step"]  # constant: the second epoch is no better than the first
    run(teacher_file, tmp_path / "run", *early, *never, "callbacks.early_stopping.mode=min")
    one = load(tmp_path / "run/checkpoints/head/last.ckpt")
    assert one["global_step"] == 2 * BATCHES
    resume = f"ckpt_path={tmp_path}/run/checkpoints/head/last.ckpt"
    run(teacher_file, tmp_path / "again", *early, *never, "callbacks.early_stopping.mode=min", resume)
    assert not (tmp_path / "again/checkpoints/head/last.ckpt").exists()
    ends = [load(tmp_path / f"{name}/checkpoints/finetune/last.ckpt") for name in ("run", "again")]
    assert differences(ends[0]["state_dict"], ends[1]["state_dict"]) == []
    saved = ends[1]["cleave"]["before"]
    assert [(step["name"], step["epochs"], step["steps"]) for step in saved] == [("head", 2, 2 * BATCHES)]


def test_without_training_the_checkpoint_is_tested(whole, tmp_path, teacher_file):
    metrics = run(teacher_file, tmp_path, "train=false", f"ckpt_path={whole}/checkpoints/finetune/best.ckpt")
    found = point(tmp_path)
    assert metrics["test/acc"] == point(whole)["accuracy"]
    assert (found["method"], found["epochs"], found["train_seconds"]) == (LABEL, None, None)
    assert found["checkpoint"] == str(whole / "checkpoints/finetune/best.ckpt")
    run(teacher_file, tmp_path, "train=false", f"ckpt_path={whole}/checkpoints/head/best.ckpt")
    assert point(tmp_path)["method"] == "Generalized head distillation"


# --- switches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["fdr", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("limit", "overfit"))]
)
def test_a_recipe_runs_in_every_debug_mode(mode, tmp_path, teacher_file):
    overrides = [*PLAIN, *NET, "experiment=bottlefit", "compare={layer2: 1.0}", f"base.ckpt_path={teacher_file}"]
    short = {"overfit": ["trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1"]}.get(mode, [])
    metrics = train(compose_config("train", [*overrides, f"debug={mode}", *short], tmp_path))
    assert math.isfinite(metrics["test/acc"])


@pytest.mark.slow
def test_a_bundle_is_of_the_last_steps_best_weights(tmp_path, teacher_file):
    run(teacher_file, tmp_path, "export=true")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert (manifest["config"]["step"], list(manifest["config"]["steps"])) == ("finetune", ["head", "finetune"])
    assert manifest["metrics"]["test/acc"] == pytest.approx(point(tmp_path)["accuracy"])


@pytest.mark.slow
def test_the_feature_cache_of_one_step_is_not_the_nexts(tmp_path, teacher_file):
    jankowski = [*PLAIN, *NET, *SHORT, "experiment=jankowski", "trainer.max_epochs=1", "data.augment=none"]
    cache = ["feature_cache.use=true", f"feature_cache.directory={tmp_path}/cache", f"base.ckpt_path={teacher_file}"]
    ends = []
    for name, overrides in {"cached": cache, "plain": cache[2:]}.items():
        train(compose_config("train", [*jankowski, *overrides, "test=false"], tmp_path / name))
        ends.append(parameters(tmp_path / name / "checkpoints/finetune/last.ckpt"))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4)


# --- mistakes ---------------------------------------------------------------------------------------------------------

# Each of them is told before anything is trained, of the second step too.
MISTAKES = {
    "+steps.head.epochs=3": r"^steps\.head\.epochs has no meaning: a step has method, training, trainer, feature_cache",
    "+steps.head.methd.train=[decoder]": r"steps\.head\.methd has no meaning.* Did you mean 'method'\?",
    "+steps.more.trainer.max_epochs=1": r"^steps\.more\.method has no _target_.*\+method@steps\.more\.method=",
    "steps.head=null": r"^steps\.head\.method has no _target_",
    "+steps.finetune.method.train=[]": r"^steps\.finetune: method\.train=\[\] trains nothing",
    "+steps.finetune.method.train=[tial]": r"^steps\.finetune: method\.train names 'tial'.*Did you mean 'tail'\?",
    "+steps.head.method.train=[head]": r"^steps\.head: method\.train names 'head', which this network lacks",
    "steps.finetune.method.loss.alpha=1.5": r"^steps\.finetune: alpha must lie in \[0, 1\], got 1\.5",
    "steps.finetune.method.loss.temperature=0": r"^steps\.finetune: temperature must be .* got 0",
    "compare={layer2: -1.0}": r"^steps\.head: weights: 'layer2' must have .* got -1\.0",
    "+steps.finetune.training.optimizer.lrr=1": r"^steps\.finetune: AdamW.* 'lrr'",
    "+steps.finetune.training.optimizer.lr=-1": r"^steps\.finetune: Invalid learning rate: -1",
    "+steps.finetune.training.scheduler.T_mx=1": r"^steps\.finetune: training\.scheduler: CosineAnnealingLR.* 'T_mx'",
    "+steps.finetune.training.lr_scales.tial=1": r"^steps\.finetune: lr_scales names 'tial'",
    "+steps.finetune.trainer.max_epoch=1": r"^steps\.finetune: .* 'max_epoch'",
}


# Another key of the same part.
ALIKE = {
    "+steps.head.method.train=[head]",
    "+steps.finetune.training.optimizer.lr=-1",
    "+steps.finetune.method.train=[]",
    "steps.finetune.method.loss.temperature=0",
    "steps.head=null",
}


@pytest.mark.parametrize("mistake", some_quick(MISTAKES, lambda mistake: mistake not in ALIKE))
def test_a_mistake_in_any_step_is_told_before_the_first_is_trained(mistake, tmp_path, teacher_file):
    with pytest.raises(ValueError, match=MISTAKES[mistake]):
        run(teacher_file, tmp_path, "logger=csv", mistake)
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "csv").exists()


def test_the_name_of_a_step_is_the_name_of_a_folder(tmp_path, teacher_file):
    cfg = compose_config("train", [*RUN, f"base.ckpt_path={teacher_file}"], tmp_path)
    OmegaConf.set_struct(cfg, False)
    for name in ("a/b", "..", ""):
        cfg.steps = {name: {"method": {"_target_": "cleave.lightning_modules.CrossEntropy"}}}
        with pytest.raises(ValueError, match=r"a step's name is made of letters"):
            train(cfg)


def test_a_recipe_without_steps(tmp_path, teacher_file):
    given = [*PLAIN, *NET, f"base.ckpt_path={teacher_file}"]
    with pytest.raises(ValueError, match=r"steps={} names no step; .*experiment=bottlefit"):
        train(compose_config("train", [*given, "steps={}"], tmp_path))
    with pytest.raises(ValueError, match="method has no _target_; choose"):
        train(compose_config("train", [*given, "method=default"], tmp_path))


def test_a_recipe_made_on_the_command_line(tmp_path, teacher_file):
    steps = ["+method@steps.one.method=head_distillation", "+method@steps.two.method=cross_entropy"]
    given = [*PLAIN, *NET, *SHORT, *steps, f"base.ckpt_path={teacher_file}"]
    train(compose_config("train", [*given, "trainer.max_epochs=1"], tmp_path))
    assert point(tmp_path)["method"] == "Head distillation → Cross entropy"


def test_what_a_step_still_needs_is_named(tmp_path):
    step = "+method@steps.one.method=generalized_head_distillation"
    cfg = compose_config("train", [step, "base.ckpt_path=FILE", "split.at=layer2"], tmp_path)
    assert missing_values(cfg) == ["steps.one.method.loss.weights"]


def test_a_checkpoint_of_another_run_is_refused(whole, tmp_path, teacher_file):
    head = f"ckpt_path={whole}/checkpoints/head/last.ckpt"
    given = [*PLAIN, *NET, *SHORT, f"base.ckpt_path={teacher_file}"]

    def refused(match: str, *overrides: str) -> None:
        with pytest.raises(ValueError, match=match):
            train(compose_config("train", [*given, *overrides], tmp_path))
        assert not (tmp_path / "checkpoints").exists()

    of_head = "is of step 'head' of the recipe head, finetune, but "
    refused(of_head + "this run is no recipe", "method=head_distillation", head)
    refused(of_head + "this run is the recipe bottleneck, finetune", "experiment=jankowski", head)
    steps = [f"+method@steps.{name}.method=cross_entropy" for name in ("head", "more")]
    refused(r"made by steps\.head\.method\._target_=.*GeneralizedHeadDistillation, but here it is .*CrossEntropy",
            *steps, head)  # fmt: skip
    finetune = f"ckpt_path={whole}/checkpoints/finetune/last.ckpt"
    steps = [f"+method@steps.{name}.method=knowledge_distillation" for name in ("other", "finetune")]
    refused("of step 'finetune' of the recipe head, finetune, but this run is the recipe other, finetune",
            *steps, finetune)  # fmt: skip
    refused("is of a run without steps, but this run is the recipe head, finetune",
            "experiment=bottlefit", "compare={layer2: 1.0}", f"ckpt_path={teacher_file}")  # fmt: skip
    refused(r"made by method\._target_=cleave\.lightning_modules\.Classification, but here it is .*\.HeadDistillation",
            "method=head_distillation", f"ckpt_path={teacher_file}")  # fmt: skip


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_spawned_processes_fit_steps_that_train_different_parts(tmp_path, teacher_file):
    folder = tmp_path / "run"
    overrides = [f"base.ckpt_path={teacher_file}", "trainer=ddp_sim", "logger=csv", "export=true"]
    overrides.append("+steps.finetune.method.train=[decoder,tail]")
    told = run_script("train", *RUN, *overrides, folder=folder, timeout=280, fresh=True)
    assert "Warning" not in told
    assert "recommended" not in told
    assert told.count("step 1 of 2") == told.count("step 2 of 2") == told.count("Bundle: ") == 1
    found = point(folder)
    assert (found["method"], found["epochs"]) == (LABEL, 2 * EPOCHS)
    assert found["train_seconds"] > 0
    steps = [int(row["step"]) for row in rows(folder)]
    assert steps == sorted(steps)
    assert max(int(row["step"]) for row in rows(folder) if "val/acc" in row) == 2 * STEPS - 1
    assert [step["score"] is not None for step in load_before(folder)] == [True]


@pytest.mark.slow
def test_two_subprocesses_fit_a_recipe(tmp_path, teacher_file):
    folder = tmp_path / "run"
    overrides = [f"base.ckpt_path={teacher_file}", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    overrides += ["trainer.precision=32-true", "trainer.plugins=null", "logger=csv"]
    told = run_script("train", *RUN, *overrides, folder=folder, timeout=280, fresh=True)
    assert told.count("step 1 of 2") == told.count("step 2 of 2") == told.count("Results: ") == 1
    assert point(folder)["epochs"] == 2 * EPOCHS
    assert max(int(row["step"]) for row in rows(folder) if "val/acc" in row) == 2 * STEPS - 1


def load_before(folder: Path) -> list[dict[str, Any]]:
    return read_checkpoint(folder / "checkpoints/finetune/last.ckpt")["cleave"]["before"]


@pytest.mark.slow
def test_each_job_of_a_sweep_has_results_of_its_own(tmp_path, teacher_file):
    folder = tmp_path / "sweep"
    run_script("train", "-m", *RUN, f"base.ckpt_path={teacher_file}", "codec.bits=2,4", folder=folder, timeout=280)
    assert [point(folder / job)["bits"] for job in ("0", "1")] == [2, 4]
    assert all(
        (folder / f"{job}/checkpoints/{step}/best.ckpt").is_file() for job in "01" for step in ("head", "finetune")
    )
