"""Lightning's and Hydra's own switches act through the config."""

import importlib
import json
import types

import pytest
import torch

from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.train import train

from .training_helpers import ROOT, load, run_script, small

IN_PROCESS = ["trainer=cpu", "callbacks.progress=null", "+trainer.enable_progress_bar=false", "logger=none"]
WATCH = ["+callbacks.watch._target_=training_helpers.Watch"]
ONE_EPOCH = [*IN_PROCESS, *small("PlainNet"), *WATCH, "trainer.max_epochs=1", "test=false"]
FEW = ["+trainer.limit_train_batches=4", "+trainer.limit_val_batches=1"]
SGD = ["training.optimizer._target_=torch.optim.SGD", "training.optimizer.lr=0.1"]


@pytest.fixture(autouse=True)
def helpers(monkeypatch) -> types.ModuleType:
    """The helpers as the overrides name them."""
    quiet()
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    return importlib.import_module("training_helpers")


def run(folder, *overrides: str) -> dict[str, float]:
    return train(compose_config("train", [*ONE_EPOCH, *overrides], folder))


def weights(folder) -> dict[str, torch.Tensor]:
    return load(folder / "checkpoints/last.ckpt")["state_dict"]


def test_gradients_are_clipped(tmp_path, helpers):
    run(tmp_path / "free", *FEW)
    assert all(step["gradient"] > 0.1 for step in helpers.Watch.steps)
    run(tmp_path / "clipped", *FEW, "trainer.gradient_clip_val=0.01")
    assert [step["gradient"] for step in helpers.Watch.steps] == pytest.approx([0.01] * 4, rel=1e-3)


def test_accumulated_gradients_take_the_step_of_the_whole_batch(tmp_path, helpers):
    run(tmp_path / "whole", *SGD, "data.batch_size=32")
    run(tmp_path / "parts", *SGD, "data.batch_size=16", "trainer.accumulate_grad_batches=2")
    assert [step["step"] for step in helpers.Watch.steps][:4] == [0, 1, 1, 2]
    assert helpers.Watch.steps[-1]["step"] == 39
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_half_precision_computes_in_it_and_keeps_the_weights(tmp_path, helpers):
    run(tmp_path, *FEW, "trainer.precision=bf16-mixed")
    assert helpers.Watch.steps[-1]["logits"] == {torch.bfloat16}
    assert helpers.Watch.steps[-1]["weights"] == {torch.float32}


def distil(folder, teacher_file, *overrides: str) -> dict[str, float]:
    given = ["experiment=digits_hnd", f"base.ckpt_path={teacher_file}", *IN_PROCESS, "trainer.max_epochs=1"]
    return train(compose_config("train", [*given, *FEW, *overrides], folder))


def test_compile_compiles_the_parts_that_run_and_renames_nothing(tmp_path, teacher_file, monkeypatch):
    calls: dict[str, int] = {}

    def counting(function, **_):
        def compiled(*args, **kwargs):
            name = (
                f"{type(function.__self__).__name__} train={function.__self__.training} grad={torch.is_grad_enabled()}"
            )
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", counting)
    distil(tmp_path / "compiled", teacher_file, "training.compile=true", "test=false")
    monkeypatch.undo()
    distil(tmp_path / "eager", teacher_file, "test=false")
    one, two = weights(tmp_path / "compiled"), weights(tmp_path / "eager")
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert calls["Sequential train=True grad=True"] == 2 * 4  # encoder and decoder, once a step
    assert not any(name.startswith("UniformQuantizer") for name in calls)  # a few operations, with a range of their own
    assert calls["Stage train=False grad=False"] > 4  # the teacher's head once a step; tails in evaluation alone
    assert not any(name.startswith("Stage train=True") for name in calls)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it as it enters `autocast`
def test_compiled_training_gives_what_eager_training_gives(tmp_path, teacher_file):
    compiled = distil(
        tmp_path / "compiled", teacher_file, "training.compile=true", "callbacks=ema", "callbacks.progress=null"
    )
    eager = distil(tmp_path / "eager", teacher_file, "callbacks=ema", "callbacks.progress=null")
    assert compiled == pytest.approx(eager, rel=0.02, abs=0.02)
    assert list(weights(tmp_path / "compiled")) == list(weights(tmp_path / "eager"))


def test_seed_zero_is_a_seed(tmp_path):
    for state in (1, 2):
        torch.manual_seed(state)
        run(tmp_path / str(state), *FEW, "seed=0")
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_layer_wise_rates(tmp_path, helpers):
    run(tmp_path, *FEW, *SGD, "+training.lr_scales.stem=0.1", "training.scheduler=null")
    assert sorted(set(helpers.Watch.steps[0]["rates"])) == pytest.approx([0.01, 0.1])


def test_another_optimizer_and_a_scheduler_of_a_known_length(tmp_path, helpers):
    one_cycle = ["training.scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "~training.scheduler.T_max"]
    one_cycle += ["+training.scheduler.max_lr=0.5", "+training.scheduler.total_steps=total_steps"]
    run(tmp_path, *FEW, *SGD, *one_cycle)
    assert helpers.Watch.steps[0]["optimizer"] == "SGD"
    rates = [step["rates"][0] for step in helpers.Watch.steps]
    assert max(rates) > 10 * rates[-1]
    assert rates[-1] == pytest.approx(0.5 / 25 / 1e4)


def test_a_scheduler_that_watches_a_metric(tmp_path, helpers):
    plateau = ["training.scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau", "~training.scheduler.T_max"]
    plateau += ["+training.scheduler.mode=max", "+training.scheduler.patience=0", "+training.scheduler.threshold=1.0"]
    run(tmp_path, *FEW, *SGD, *plateau, "training.scheduler_interval=epoch", "trainer.max_epochs=3")
    rates = [step["rates"][0] for step in helpers.Watch.steps]
    assert rates == pytest.approx([0.1] * 8 + [0.01] * 4)  # the first epoch sets the mark, the second fails it


def test_debug_fdr_runs_one_batch_of_everything_and_leaves_nothing(tmp_path, helpers):
    metrics = run(tmp_path, "debug=fdr", "test=true", "logger=csv")
    assert {"val/acc", "test/acc"} <= set(metrics)
    assert len(helpers.Watch.steps) == 1
    assert not list(tmp_path.rglob("*.ckpt"))


def test_debug_overfit_learns_the_same_batches_by_heart(tmp_path, helpers):
    faster = ["trainer.detect_anomaly=false", "training.optimizer.lr=0.03", "training.scheduler=null"]
    run(tmp_path, "debug=overfit", "trainer.max_epochs=60", *faster)
    steps = helpers.Watch.steps
    assert len(steps) == 60 * 3
    assert len({step["images"] for step in steps}) == 3
    assert steps[-1]["loss"] < 0.1 * steps[0]["loss"]


def test_a_run_that_evaluates_nothing(tmp_path):
    metrics = run(tmp_path, *FEW, "trainer.limit_val_batches=0", "callbacks.checkpoint=null", "optimized_metric=null")
    assert set(metrics) == {"train/loss"}
    assert [p.name for p in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]


@pytest.mark.parametrize(("logger", "left"), [("csv", "metrics.csv"), ("tensorboard", "events.out"), ("none", None)])
def test_loggers(tmp_path, logger, left):
    run(tmp_path, *FEW, f"logger={logger}")
    written = {p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".ckpt"}
    assert any(name.startswith(left) for name in written) if left else not written


def test_resuming_from_a_file_that_is_not_there(tmp_path, helpers):
    helpers.Watch.steps = []
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        run(tmp_path, "ckpt_path=nowhere.ckpt")
    assert not helpers.Watch.steps


def test_resuming_from_a_truncated_file(tmp_path, teacher_file):
    (tmp_path / "cut.ckpt").write_bytes(teacher_file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        run(tmp_path, f"ckpt_path={tmp_path}/cut.ckpt")


def test_resuming_from_another_network(tmp_path, teacher_file):
    with pytest.raises(ValueError, match="another architecture"):
        run(tmp_path, f"ckpt_path={teacher_file}")


def test_a_sweep_runs_each_job_in_its_folder_and_returns_its_metric(tmp_path, teacher_file):
    grid = ["experiment=digits_hnd", "hparams_search=bottleneck_grid", f"base.ckpt_path={teacher_file}"]
    trimmed = ["bottleneck.channels=2,4", "codec.bits=4", "debug=limit", "trainer.max_epochs=1", *IN_PROCESS[1:]]
    returned = ["+hydra.callbacks.returned._target_=training_helpers.WriteReturned", "optimized_metric=test/loss"]
    told = run_script("train", *grid, *trimmed, *returned, folder=tmp_path / "sweep")
    assert told.count("\nResults of best.ckpt\n") == 2
    for job, channels in (("0", 2), ("1", 4)):
        folder = tmp_path / "sweep" / job
        assert load(folder / "checkpoints/best.ckpt")["cleave"]["config"]["bottleneck"]["channels"] == channels
        assert json.loads((folder / "returned.json").read_text()) > 0
