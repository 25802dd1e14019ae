"""A run resumed wherever it saved goes on with the learning rates and weights of an uninterrupted one."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from cleave.architectures import staged_network
from cleave.datamodules import Digits
from cleave.lightning_modules import Classification, Training, privates
from cleave.lightning_modules.callbacks import BestCheckpoint, LastCheckpoint

from .training_helpers import differences, load, quiet_trainer

EPOCHS, BATCHES = 3, 5


class Halve:
    """A factor of the learning rate with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.5**step + 0.01 * self.calls


def warm_up_and_fall(optimizer: Optimizer) -> Any:
    parts = [
        torch_schedulers.LinearLR(optimizer, 0.1, 1.0, 2),
        torch_schedulers.ExponentialLR(optimizer, 0.8),
    ]
    return torch_schedulers.SequentialLR(optimizer, parts, [2])


def chained(optimizer: Optimizer) -> Any:
    return torch_schedulers.ChainedScheduler(
        [torch_schedulers.ConstantLR(optimizer, 0.3, 2), torch_schedulers.StepLR(optimizer, 2, 0.7)]
    )


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: torch_schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
    "LambdaLR with a state": lambda optimizer: torch_schedulers.LambdaLR(optimizer, Halve()),
    "MultiplicativeLR": lambda optimizer: torch_schedulers.MultiplicativeLR(optimizer, lambda step: 0.9),
    "StepLR": functools.partial(torch_schedulers.StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": functools.partial(torch_schedulers.MultiStepLR, milestones=[1, 2, 5], gamma=0.5),
    "ConstantLR": functools.partial(torch_schedulers.ConstantLR, factor=0.5, total_iters=2),
    "LinearLR": functools.partial(torch_schedulers.LinearLR, start_factor=0.1, total_iters=4),
    "ExponentialLR": functools.partial(torch_schedulers.ExponentialLR, gamma=0.9),
    "PolynomialLR": functools.partial(torch_schedulers.PolynomialLR, total_iters=7, power=2.0),
    "CosineAnnealingLR": functools.partial(torch_schedulers.CosineAnnealingLR, T_max=5),
    "CosineAnnealingWarmRestarts": functools.partial(torch_schedulers.CosineAnnealingWarmRestarts, T_0=2, T_mult=2),
    "CyclicLR": functools.partial(torch_schedulers.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "OneCycleLR": functools.partial(torch_schedulers.OneCycleLR, max_lr=0.1, total_steps=EPOCHS * BATCHES + 1),
    "SequentialLR": warm_up_and_fall,
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": functools.partial(
        torch_schedulers.ReduceLROnPlateau, mode="max", factor=0.7, patience=0, cooldown=1
    ),
}
LEFT_OUT = {"LRScheduler", "SWALR"}  # the base; averaged weights are Lightning's own callback
WAYS: dict[str, dict[str, Any]] = {
    "plainly": {},
    "accumulating": {"accumulate_grad_batches": 2},
    "validating within epochs": {"val_check_interval": 2},
    "accumulating and validating within epochs": {"accumulate_grad_batches": 2, "val_check_interval": 3},
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Rates(pl.Callback):
    """Notes the learning rate of each batch, and the loss."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], tuple[float, float]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.seen[trainer.current_epoch, batch_idx] = (float(rate), float(outputs["loss"]))


class Run(NamedTuple):
    """The rates of a run, its final state, and every checkpoint that it saved."""

    rates: dict[tuple[int, int], tuple[float, float]]
    final: dict[str, Any]
    saved: list[Path]


def run(folder: Path, training: Training, resume: Path | None = None, **way: Any) -> Run:
    """Train three epochs, saving ``last.ckpt`` after every step and the best checkpoint; keep each save."""
    folder.mkdir()
    torch.manual_seed(0)
    every = 1 if resume is None else None
    task = Classification(staged_network(Network(), torch.randn(2, 1, 8, 8)), training=training)
    rates, saved = Rates(), list[Path]()
    best = BestCheckpoint(folder, filename="best", monitor="val/acc", mode="max", enable_version_counter=False)
    trainer = quiet_trainer(
        limit_train_batches=BATCHES, limit_val_batches=1, num_sanity_val_steps=0,
        callbacks=[rates, best, LastCheckpoint(str(folder), every)], enable_checkpointing=True,
        **{"max_epochs": EPOCHS} | way,
    )  # fmt: skip
    save = trainer.save_checkpoint

    def keep(path: Any, *arguments: Any, **named: Any) -> None:
        save(path, *arguments, **named)
        if resume is None:
            place = f"{trainer.current_epoch}-{trainer.fit_loop.epoch_loop.batch_idx}"
            saved.append(folder / f"{len(saved)}-{place}-{Path(path).name}")
            shutil.copy(path, saved[-1])

    trainer.save_checkpoint = keep  # type: ignore[method-assign]
    trainer.fit(task, datamodule=data(), ckpt_path=resume, weights_only=True)
    save(folder / "final.ckpt")
    return Run(rates.seen, load(folder / "final.ckpt"), saved)


@functools.cache
def data() -> Digits:
    return Digits(batch_size=16, image_size=8)


def compare(whole: Run, resumed: Run, at: Path) -> None:
    assert resumed.rates.items() <= whole.rates.items(), at.name
    assert len(resumed.rates) < len(whole.rates)
    if not resumed.rates:
        return  # nothing was left to train
    states = [{k: v for k, v in each.final.items() if k not in ("callbacks", "loops")} for each in (whole, resumed)]
    assert differences(*states) == [], at.name
    steps = [each.final["loops"]["fit_loop"]["epoch_loop.state_dict"] for each in (whole, resumed)]
    assert steps[0] == steps[1], at.name


def training_of(name: str, interval: str) -> Training:
    return Training(
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        SCHEDULERS[name],
        scheduler_interval=interval,
        monitor="train/loss" if interval == "step" else None,
    )


def test_every_scheduler_of_torch_is_tried():
    named = {name for name in torch_schedulers.__all__ if name not in LEFT_OUT}
    assert named == {name.partition(" ")[0] for name in SCHEDULERS}


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
@pytest.mark.parametrize("interval", ["step", pytest.param("epoch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_run_has_the_rates_and_weights_of_an_uninterrupted_one(name, interval, tmp_path):
    training = training_of(name, interval)
    whole = run(tmp_path / "whole", training)
    inside, end = whole.saved[2], next(path for path in whole.saved if path.name.endswith(f"{BATCHES - 1}-last.ckpt"))
    for at in whole.saved[::2] if name == "ReduceLROnPlateau" else (inside, end)[: 2 if interval == "epoch" else 1]:
        compare(whole, run(tmp_path / f"from-{at.name}", training, at), at)


COMBINED = "accumulating and validating within epochs"
SCHEDULES = [
    ("ReduceLROnPlateau", "epoch"),
    ("OneCycleLR", "step"),
    pytest.param("ReduceLROnPlateau", "step", marks=pytest.mark.slow),
    pytest.param("StepLR", "epoch", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "interval"), SCHEDULES)
@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way != COMBINED)) for way in WAYS])
def test_it_does_so_however_it_validates_and_accumulates(way, name, interval, tmp_path):
    training = training_of(name, interval)
    whole = run(tmp_path / "whole", training, **WAYS[way])
    assert len(whole.saved) > EPOCHS
    for at in whole.saved:
        compare(whole, run(tmp_path / f"from-{at.name}", training, at, **WAYS[way]), at)


def test_a_finished_run_goes_on_for_more_epochs(
    tmp_path,
):
    training = training_of("ReduceLROnPlateau", "epoch")
    whole = run(tmp_path / "whole", training)
    short = run(tmp_path / "short", training, max_epochs=EPOCHS - 1)
    compare(whole, run(tmp_path / "longer", training, short.saved[-1]), short.saved[-1])


def test_the_checkpoint_within_an_epoch_lies_behind_the_validation_at_its_step(tmp_path):
    whole = run(tmp_path / "whole", training_of("StepLR", "step"), val_check_interval=2)
    for path in whole.saved:
        loops = load(path)["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]["current"]
        validated = loops["epoch_loop.val_loop.batch_progress"]["total"]["completed"]
        assert validated == batches["ready"] // 2


def test_what_is_reached_of_lightnings_own_says_where_a_run_stands(tmp_path):
    class Standing(pl.Callback):
        seen: list[tuple[bool, bool]] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen.append((privates.accumulating(trainer), privates.validates_now(trainer)))

    task = Classification(staged_network(Network(), torch.randn(2, 1, 8, 8)))
    trainer = quiet_trainer(
        max_epochs=1, limit_train_batches=5, limit_val_batches=1, accumulate_grad_batches=2, val_check_interval=3,
        num_sanity_val_steps=0, callbacks=[Standing()],
    )  # fmt: skip
    trainer.fit(task, datamodule=data())
    assert Standing.seen == [(True, False), (False, False), (True, True), (False, False), (False, False)]
    privates.restore_metrics(trainer, {"kept": torch.tensor(0.25)})
    assert trainer.callback_metrics["kept"] == 0.25
