"""A run that is stopped and resumed must see what an uninterrupted one sees: the same images, and the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from cleave.datamodules import Digits

EPOCH = 6  # batches of an epoch
pytestmark = [
    # Lightning remarks on a second run that saves beside the first.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
        self.seen: list[tuple[int, int, bytes]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch["images"], batch["labels"]
        self.seen.append((self.current_epoch, batch_idx, images.cpu().numpy().tobytes()))
        return nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(self.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def run(folder: Path, resume: Path | None = None, workers: int = 0, **options: Any) -> Classifier:
    """Train three epochs, or ``max_steps``, saving after every step and at every epoch's end."""
    network = Classifier()
    if "max_steps" not in options:
        options["max_epochs"] = 3
    savers: list[pl.Callback] = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True),
        ModelCheckpoint(folder, "{step}-end", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=savers,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = Digits(batch_size=200, num_workers=workers)
    trainer.fit(network, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return network


def assert_same_end(whole: Classifier, resumed: Classifier, last: bool) -> None:
    assert resumed.seen or last
    assert whole.seen[len(whole.seen) - len(resumed.seen) :] == resumed.seen
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


WAYS: list[tuple[dict[str, Any], list[int], list[int]]] = [  # with steps for `make test` and for `make test-full`
    ({}, [4, 6], [1, 9, 18]),
    ({"workers": 2}, [], [4, 6, 11]),
    ({"accumulate_grad_batches": 4}, [1], [2, 3]),
    ({"val_check_interval": 2}, [1, 8], [2, 6, 13]),
    ({"max_steps": 15}, [14], [4, 6]),
    ({"limit_train_batches": 4}, [3], [4, 6]),
    ({"workers": 2, "val_check_interval": 3, "accumulate_grad_batches": 2}, [4], [1, 3]),
]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        *((options, steps) for options, steps, _ in WAYS if steps),
        *(pytest.param(options, steps, marks=pytest.mark.slow) for options, _, steps in WAYS),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else None,
)
def test_resuming_at_any_step_is_exact(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    whole = run(tmp_path, **options)
    assert len({content for *_, content in whole.seen}) == len(whole.seen)
    for step in steps:
        resumed = run(tmp_path / f"from-{step}", tmp_path / f"step={step}.ckpt", **options)
        assert_same_end(whole, resumed, last=step == 18)
        after = [at for at in whole.validated if at > step]
        assert [at for at in resumed.validated if at > step] == after


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"workers": 2}, marks=pytest.mark.slow), {"max_steps": 15}], ids=str
)
def test_resuming_at_an_epochs_end_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = run(tmp_path, **options)
    for step in (EPOCH, 2 * EPOCH):
        resumed = run(tmp_path / f"from-{step}", tmp_path / f"step={step}-end.ckpt", **options)
        assert resumed.seen[0][:2] == (step // EPOCH, 0)
        assert_same_end(whole, resumed, last=False)


def test_a_run_may_resume_twice_and_with_other_workers(tmp_path: Path) -> None:
    whole = run(tmp_path)
    first = run(tmp_path / "b", tmp_path / "step=3.ckpt", workers=2)
    assert_same_end(whole, first, last=False)
    second = run(tmp_path / "c", tmp_path / "b/step=10.ckpt")
    assert len(second.seen) == 8
    assert_same_end(whole, second, last=False)


def test_another_batch_size_inside_an_epoch_is_refused(tmp_path: Path) -> None:
    run(tmp_path, limit_val_batches=0)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.raises(ValueError, match=r"'batch_size': 200.*'batch_size': 100"),
    ):
        trainer.fit(
            Classifier(), datamodule=Digits(batch_size=100), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True
        )
