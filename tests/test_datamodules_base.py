from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities.warnings import PossibleUserWarning
from torch import Tensor

from cleave.datamodules import Digits, ImageFolder
from cleave.datamodules.sources import ImageSource
from cleave.deployment import ImageInput

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Recorder(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: dict[str, list[dict[str, Tensor]]] = {"train": [], "val": [], "test": [], "predict": []}

    def keep(self, stage: str, batch: dict[str, Tensor]) -> Tensor:
        self.batches[stage].append({name: part.clone() for name, part in batch.items()})
        return self.weight * batch["images"].mean()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.keep("train", batch)

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.keep("val", batch)

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.keep("test", batch)

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.keep("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(module: Digits, epoch: int) -> list[dict[str, Tensor]]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def equal(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    pairs = list(zip(first, second, strict=True))
    assert all(one.keys() == other.keys() for one, other in pairs)
    return all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)


# --- the input --------------------------------------------------------------------------------------------------------


def test_a_backbones_input_flows_in_and_overrides_win() -> None:
    backbone = ImageInput(
        height=224, width=224, resize=256, mean=(0.1, 0.2, 0.3), std=(1, 2, 3), interpolation="bicubic"
    )
    plain = Digits()
    plain.configure_input(backbone)
    assert plain.input == backbone
    module = Digits(image_size=112, std=(0.5, 0.5, 0.5), interpolation="lanczos")
    module.configure_input(backbone)
    spec = module.input
    assert (spec.height, spec.width, spec.resize) == (112, 112, 128)
    assert (spec.mean, spec.std, spec.interpolation) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "lanczos")
    assert Digits(image_size=(12, 10)).input.shape == (1, 12, 10)


def test_configuring_the_input_drops_what_was_cached_for_another() -> None:
    module = Digits()
    module.setup("fit")
    before = module.dataset("train")
    module.configure_input(module.input)
    assert module.dataset("train") is before
    module.configure_input(ImageInput(height=16, width=16))
    assert module.dataset("train") is not before
    assert next(iter(module.val_dataloader()))["images"].shape[1:] == (3, 16, 16)


def test_an_override_that_does_not_fit_the_backbone_is_refused() -> None:
    module = Digits(mean=(0.5,))
    with pytest.raises(ValueError, match="mean and std need 3 values"):
        module.configure_input(ImageInput(height=32, width=32))
    assert module.input.color_mode == "L"


def test_a_sample_batch_is_spread_and_not_augmented() -> None:
    module = Digits(augment="imagenet", image_size=10)
    batch = module.sample_batch("train", 40)
    images, labels = batch["images"], batch["labels"]
    source = module.split("train")
    assert images.dtype == torch.uint8
    assert len(set(labels.tolist())) > 5
    assert torch.equal(images[39], module.input(source.picture(len(source) - 1)))
    assert len(module.sample_batch("val", 10_000)["images"]) == 179


# --- under a trainer --------------------------------------------------------------------------------------------------


def test_batches_arrive_normalized_in_every_stage() -> None:
    network, module = Recorder(), Digits(batch_size=100, augment="none")
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET)
    trainer.fit(network, datamodule=module)
    trainer.test(network, datamodule=module, verbose=False)
    trainer.predict(network, datamodule=module)
    counts = {"train": 12, "val": 2, "test": 4, "predict": 4}
    for stage, seen in network.batches.items():
        assert len(seen) == counts[stage]
        assert {batch["images"].dtype for batch in seen} == {torch.float32}
        assert {batch["labels"].dtype for batch in seen} == {torch.int64}
    for stage, split in (("val", "val"), ("test", "test"), ("predict", "test")):
        source = module.split(split)
        expected = [module.input.normalize(module.input(source.picture(index))) for index in range(len(source))]
        found = {name: torch.cat([b[name] for b in network.batches[stage]]) for name in ("images", "labels")}
        assert torch.equal(found["images"], torch.stack(expected))
        assert torch.equal(found["labels"], torch.from_numpy(source.labels))


def test_batches_take_the_trainers_true_precision() -> None:
    network = Recorder()
    trainer = pl.Trainer(max_steps=1, limit_val_batches=0, precision="64-true", **QUIET)
    trainer.fit(network, datamodule=Digits())
    assert network.batches["train"][0]["images"].dtype == torch.float64


def test_overfitting_repeats_the_same_batches_without_a_warning() -> None:
    network = Recorder()
    pl.Trainer(overfit_batches=2, max_epochs=2, num_sanity_val_steps=0, **QUIET).fit(network, datamodule=Digits())
    seen = network.batches["train"]
    assert len(seen) == 4
    assert equal(seen[:2], seen[2:])


def test_lightnings_epoch_reaches_the_sampler() -> None:
    network, module = Recorder(), Digits(batch_size=400)
    pl.Trainer(max_epochs=2, limit_val_batches=0, **QUIET).fit(network, datamodule=module)
    module.trainer = None
    before = [b for e in (0, 1) for b in batches(module, e)]
    expected = [b | {"images": module.input.normalize(b["images"]), "pixels": b["images"]} for b in before]
    assert equal(network.batches["train"], expected)


@pytest.mark.filterwarnings("error:.*does not have many workers")
def test_lightnings_advice_on_workers_is_kept_for_those_it_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning gives it on machines of three cores and more.
    monkeypatch.setattr("pytorch_lightning.trainer.connectors.data_connector.suggested_max_num_workers", lambda _: 8)
    for name in ("a", "b"):
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{number}.png")
    options: dict[str, Any] = {"batch_size": 2, "augment": "none"}
    with pytest.raises(PossibleUserWarning, match="does not have many workers"):
        pl.Trainer(max_epochs=1, **QUIET).fit(Recorder(), datamodule=ImageFolder(tmp_path, cache=False, **options))
    pl.Trainer(max_epochs=1, **QUIET).fit(Recorder(), datamodule=ImageFolder(tmp_path, cache=True, **options))


# --- order and augmentation -------------------------------------------------------------------------------------------


class Few(Digits):
    """The first digits alone."""

    def load_splits(self) -> dict[str, ImageSource]:
        return {name: source.subset(np.arange(100)) for name, source in super().load_splits().items()}


@pytest.mark.parametrize("augment", ["crop", "randaugment", "imagenet"])
def test_workers_do_not_change_the_batches(augment: str) -> None:
    alone, helped = (Few(batch_size=50, augment=augment, num_workers=workers) for workers in (0, 2))
    for epoch in (0, 1):
        assert equal(batches(alone, epoch), batches(helped, epoch))


def two_epochs(module: Digits) -> list[list[dict[str, Tensor]]]:
    # In a function of its own: Lightning's `save_hyperparameters` keeps the caller's frame in a reference cycle, and
    # workers that the garbage collector has to stop take ten seconds to do so.
    loader = module.train_dataloader()
    assert loader.persistent_workers == (module.num_workers > 0)
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(list(loader))
    return epochs


def test_persistent_workers_follow_the_epoch() -> None:
    alone, helped = (two_epochs(Digits(batch_size=300, num_workers=workers)) for workers in (0, 2))
    assert all(equal(first, second) for first, second in zip(alone, helped, strict=True))
    assert not equal(helped[0], helped[1])


def test_loading_draws_nothing_from_the_global_generators() -> None:
    module = Digits(augment="randaugment", batch_size=600)
    module.setup()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    for loader in (module.train_dataloader(), module.val_dataloader()):
        for _ in loader:
            pass
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002


def test_the_seed_decides_order_and_augmentation() -> None:
    assert equal(batches(Digits(seed=1), 0), batches(Digits(seed=1), 0))
    assert not equal(batches(Digits(seed=1), 0), batches(Digits(seed=2), 0))


def test_drop_last() -> None:
    assert [len(batch["labels"]) for batch in batches(Digits(batch_size=500), 0)] == [500, 500]
    assert [len(batch["labels"]) for batch in batches(Digits(batch_size=500, drop_last=False), 0)] == [500, 500, 259]
    with pytest.raises(ValueError, match=r"batch_size=2000 on 1 device\(s\) leaves no whole batch of 1259"):
        Digits(batch_size=2000).train_dataloader()


def test_evaluation_has_a_batch_size_of_its_own_and_drops_nothing() -> None:
    loader = Digits(batch_size=8, eval_batch_size=100).test_dataloader()
    assert [len(batch["labels"]) for batch in loader] == [100, 100, 100, 59]


def test_a_training_split_can_be_served_without_augmentation() -> None:
    module = Digits()
    images = torch.cat([batch["images"] for batch in module.eval_dataloader("train")])
    assert np.array_equal(images[:, 0].numpy(), module.split("train").pixels)  # type: ignore[attr-defined]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"eval_batch_size": 2.5}, "eval_batch_size must be an integer of at least 1, got 2.5"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"num_workers": True}, "num_workers must be an integer of at least 0, got True"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"augment": "mixup"}, "unknown augment='mixup'; known are"),
        ({"cache": "always"}, "cache must be True, False or 'auto', got 'always'"),
        ({"image_size": 0}, "image_size must be a positive integer or"),
        ({"image_size": (1, 2, 3)}, "image_size must be a positive integer or"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**options)


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="unknown split 'training'; known are"):
        Digits().split("training")


def test_hyper_parameters_are_primitives_that_load_back(tmp_path: Path) -> None:
    module = ImageFolder(tmp_path, batch_size=3, mean=[0.1, 0.2, 0.3], image_size=(8, 8), seed=4)
    torch.save(dict(module.hparams), tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    assert loaded["root"] == str(tmp_path)
    assert loaded["batch_size"] == 3
    again = ImageFolder(**loaded)
    assert dict(again.hparams) == loaded
    assert again.overrides == module.overrides


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("replace", [True, False])
def test_two_devices_share_the_images(tmp_path: Path, replace: bool) -> None:
    script = f"""
    import logging, sys, warnings, torch, pytorch_lightning as pl
    from cleave.datamodules import Digits
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))
            self.seen = {{"train": [], "val": []}}
        def loss(self, stage, batch):
            self.seen[stage].append(batch["images"].flatten(1))
            return torch.nn.functional.cross_entropy(self.layer(batch["images"]), batch["labels"])
        def training_step(self, batch):
            return self.loss("train", batch)
        def validation_step(self, batch):
            self.loss("val", batch)
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)
    net = Net()
    # 179 validation images: shares of 90 and 89 make two batches and one at 89 images a batch.
    data = Digits(batch_size=100, eval_batch_size=89, augment="none")
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        use_distributed_sampler={replace}, num_sanity_val_steps=0, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False)
    trainer.fit(net, datamodule=data)
    torch.save({{name: torch.cat(seen) for name, seen in net.seen.items()}}, f"{tmp_path}/{{trainer.global_rank}}.pt")
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [len(rank["train"]) for rank in ranks] == [600, 600]
    assert [len(rank["val"]) for rank in ranks] == [90, 89]
    module = Digits(augment="none")
    images = module.dataset("val").batch(range(179))["images"]
    expected = module.input.normalize(images).flatten(1)
    served = torch.empty_like(expected)
    served[0::2], served[1::2] = ranks[0]["val"], ranks[1]["val"]
    assert torch.equal(served, expected)
