"""A resumed run says what it was given otherwise, what is ignored of it, and what it does to the schedule."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EarlyStopping

from cleave.lightning_modules.callbacks import ResumedSchedule
from cleave.scripts.assembly.given.resumed import compare, differences

from .training_helpers import PLAIN, load, run_script, small

RUN = [*PLAIN, *small("PlainNet"), "+trainer.limit_train_batches=4", "test=false", "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    run_script("train", *RUN, folder=folder)
    return folder / "checkpoints/last.ckpt"


def test_what_differs_is_listed_with_what_becomes_of_it(first, tmp_path):
    changed = ["trainer.max_epochs=4", "data.batch_size=32", "training.optimizer.lr=0.5", "seed=3"]
    overrides = [each for each in RUN if "max_epochs" not in each]
    told = run_script("train", *overrides, *changed, f"ckpt_path={first}", folder=tmp_path / "run")
    assert re.search(r"training\.optimizer\.lr: 0\.001 → 0\.5: ignored", told)
    assert re.search(r"\n  seed: 0 → 3: from here on: other order", told)
    assert re.search(r"data\.batch_size: 64 → 32: from here on; .* leaves images out or repeats some", told)
    assert "trainer.max_epochs: 2 → 4" in told
    assert "CosineAnnealingLR was made for 8 steps and stays so, this run has 16: behind them the rate rises" in told
    assert "Repeat" not in told  # of the options none is missing
    assert load(tmp_path / "run/checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.001


def test_a_finished_run_resumed_as_it_was_says_that_nothing_is_left_and_ends_with_0(first, tmp_path):
    told = run_script("train", *RUN, f"ckpt_path={first}", folder=tmp_path / "run")
    assert "at the end of its training, 2 epochs and 8 steps: nothing is left to train" in told
    assert "other settings" not in told


@pytest.mark.parametrize("given", [[], ["method=knowledge_distillation", "trainer=cpu"]])
def test_a_run_resumed_without_its_options_says_to_repeat_them(first, given, tmp_path):
    told = run_script("train", *given, f"ckpt_path={first}", folder=tmp_path / "run", code=1)
    (command,) = re.findall(r"Repeat the run's options: python (.*)", told)
    words = shlex.split(command)
    assert Path(words[0]).parts[-2:] == ("scripts", "train.py")
    assert words[1:] == [*RUN, f"ckpt_path={first}"]
    assert "Traceback" not in told


def test_an_option_left_out_that_leaves_the_network_alone_is_listed_with_the_command(first, tmp_path):
    overrides = [each for each in RUN if "limit_train" not in each and "max_epochs" not in each]
    told = run_script("train", *overrides, "trainer.max_epochs=3", f"ckpt_path={first}", folder=tmp_path / "run")
    assert "trainer.limit_train_batches: 4 → null: from here on" in told
    (command,) = re.findall(r"Repeat the run's options .*: python (.*)", told)
    assert set(shlex.split(command)) >= {"+trainer.limit_train_batches=4", "trainer.max_epochs=3"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.optimizer._target_", "torch.optim.Adam"),
        ("training.scheduler._target_", "torch.optim.lr_scheduler.StepLR"),
        ("training.lr_scales", {"stem": 0.1}),
        ("training.decay_norms_and_biases", True),
        ("method.train", ["tail"]),
    ],
)
def test_what_the_state_of_optimizer_and_schedule_would_not_fit_is_refused(first, key, value):
    checkpoint = load(first)
    cfg = OmegaConf.create(checkpoint["cleave"]["config"])
    OmegaConf.update(cfg, key, value)
    cfg.ckpt_path = str(first)
    with pytest.raises(ValueError, match=rf"cannot be resumed with {re.escape(key)}.*base\.ckpt_path=FILE"):
        compare(cfg, OmegaConf.to_container(cfg), checkpoint)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_what_changes_no_weight_is_no_difference():
    one = {"paths": {"a": 1}, "data": {"num_workers": 0, "seed": 0}, "seed": 0, "callbacks": {"c": {"dirpath": "a"}}}
    other = {"paths": {"a": 2}, "data": {"num_workers": 4, "seed": 0}, "seed": 0, "callbacks": {"c": {"dirpath": "b"}}}
    assert differences(one, other) == []
    assert differences({"teacher": None}, {"teacher": {}}) == []


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        ("training.optimizer.weight_decay", "ignored"),
        ("training.optimizer.momentum", "ignored"),
        ("training.scheduler.eta_min", "ignored"),
        ("base.ckpt_path", "ignored"),
        ("host.ckpt_path", "ignored"),
        ("host.weights", "ignored"),
        ("host.backbone.weights", "ignored"),
        ("backbone.weights", "ignored"),
        ("callbacks.early_stopping.patience", "ignored"),
        ("method.alpha", "from here on"),
        ("data.augment", "from here on"),
        ("channel.rate", "from here on"),
        ("trainer.gradient_clip_val", "from here on"),
    ],
)
def test_the_effect_of_a_setting(key, effect):
    def nested(value):
        for name in reversed(key.split(".")):
            value = {name: value}
        return value

    (found,) = differences(nested(1), nested(2))
    assert (found.key, found.before, found.now) == (key, 1, 2)
    assert found.effect.startswith(effect)


def test_lightning_restores_the_patience_of_early_stopping():
    stopping = EarlyStopping("val/acc", patience=3)
    state = EarlyStopping("val/acc", patience=5).state_dict()
    stopping.load_state_dict(state)
    assert stopping.patience == 5


@pytest.mark.parametrize(
    ("scheduler", "key", "now", "word"),
    [
        (torch.optim.lr_scheduler.CosineAnnealingLR, "T_max", 20, "the rate rises again"),
        (torch.optim.lr_scheduler.CosineAnnealingLR, "T_max", 5, "before the rate has come to its end"),
        (torch.optim.lr_scheduler.PolynomialLR, "total_iters", 20, "stays where that schedule ends"),
        (torch.optim.lr_scheduler.CosineAnnealingLR, "T_max", 10, ""),
    ],
)
def test_a_schedule_of_another_number_of_steps(scheduler, key, now, word, capsys):
    ResumedSchedule().on_train_start(*resumed(scheduler, key, now))
    told = capsys.readouterr().out
    assert word in told
    assert bool(told) == bool(word)


def test_a_schedule_without_a_rate_behind_its_end_is_refused():
    with pytest.raises(ValueError, match=r"OneCycleLR was made for 10 steps .* has 20.*base\.ckpt_path=FILE"):
        ResumedSchedule().on_train_start(*resumed(torch.optim.lr_scheduler.OneCycleLR, "total_steps", 20, max_lr=1.0))


def resumed(scheduler, key, now, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    config = SimpleNamespace(scheduler=scheduler(optimizer, **{key: 10}, **arguments))
    loop = SimpleNamespace(is_resuming=True)
    trainer = SimpleNamespace(fit_loop=loop, estimated_stepping_batches=now, lr_scheduler_configs=[config])
    factory = SimpleNamespace(keywords={key: "total_steps"})
    return trainer, SimpleNamespace(settings=SimpleNamespace(scheduler=factory))
