"""Further parts of a batch: masks that move with their images, boxes, data without classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from cleave.datamodules import CorruptImageError, Digits, ImageDataModule, ImageFolder
from cleave.datamodules.caching import precompute
from cleave.datamodules.sources import ArraySource, FileSource, ImageSource, split_off
from cleave.deployment import ImageInput


class InkedDigits(Digits):
    """Digits with a class for every pixel: blank, pale, dark."""

    parts = ("images", "labels", "mask")
    maps = ("mask",)

    def further_parts(self, split: str, source: ImageSource) -> dict[str, Any]:
        return {"mask": ink(torch.from_numpy(source.pixels))}  # type: ignore[attr-defined]


class BoxedDigits(Digits):
    """Digits with a number of boxes of its own for every image, and no labels."""

    parts = ("images", "boxes")

    def further_parts(self, split: str, source: ImageSource) -> dict[str, Any]:
        return {"boxes": Boxes(source.labels)}


class Boxes:
    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts

    def __call__(self, indices: np.ndarray) -> list[Tensor]:
        return [torch.full((int(self.counts[i]), 4), float(i)) for i in indices]


def ink(pixels: Tensor) -> Tensor:
    return (pixels > 60).long() + (pixels > 180).long()


def epoch_of(data: ImageDataModule, epoch: int = 0) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_mask_moves_with_its_image(augment: str, workers: int) -> None:
    data = InkedDigits(batch_size=300, augment=augment, num_workers=workers)
    plain = Digits(batch_size=300, augment=augment)
    for batch, without in zip(epoch_of(data, 2), epoch_of(plain, 2), strict=True):
        assert list(batch) == ["images", "labels", "mask"]
        assert batch["mask"].shape == (300, 8, 8)
        assert torch.equal(batch["mask"], ink(batch["images"][:, 0]))
        assert all(torch.equal(batch[name], without[name]) for name in without)
    for batch in (*data.val_dataloader(), data.sample_batch("train", 5), data.dataset("test").batch([3])):
        assert torch.equal(batch["mask"], ink(batch["images"][:, 0]))
    assert data.dataset("test")[7]["mask"].shape == (8, 8)


@pytest.mark.parametrize("augment", ["randaugment", "trivial", "imagenet"])
def test_augmentation_that_cannot_move_a_mask_is_refused(augment: str) -> None:
    data = InkedDigits(augment=augment)
    with pytest.raises(ValueError, match=rf"augment='{augment}' cannot move \['mask'\].*use augment='none', 'crop'"):
        data.setup("fit")
    data.setup("test")


class Dense(pl.LightningModule):
    def __init__(self, root: Path | None = None) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 3, 1)
        self.root = root
        self.batches: list[dict[str, Any]] = []

    def on_fit_start(self) -> None:
        if self.root is not None:
            data: ImageDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
            data.cache_features(
                lambda batch: {"student/double": 2 * batch["images"], "ink": batch["mask"].float()},
                "x",
                directory=self.root,
                images=False,
            )

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        self.batches.append(batch)
        images = batch["given"]["student/double"] / 2 if "given" in batch else batch["images"]
        loss = nn.functional.cross_entropy(self.layer(images), batch["mask"])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.log("val", self.layer(batch["images"]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(task: Dense, data: ImageDataModule) -> Dense:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(task, datamodule=data)
    return task


def test_every_part_reaches_a_task_and_what_is_computed_in_advance(tmp_path: Path) -> None:
    plain = fit(Dense(), InkedDigits(batch_size=300, augment="none"))
    cached = fit(Dense(tmp_path), InkedDigits(batch_size=300, augment="none"))
    for before, batch in zip(plain.batches, cached.batches, strict=True):
        assert list(batch) == ["labels", "mask", "given"]
        assert torch.equal(batch["mask"], before["mask"])
        assert torch.equal(batch["given"]["student/double"], 2 * before["images"])
        assert torch.equal(batch["given"]["ink"], before["mask"].float())


def test_stored_features_are_known_by_further_parts_as_well() -> None:
    source = InkedDigits().split("val")
    mask = np.zeros((179, 8, 8), dtype=np.uint8)
    other = mask.copy()
    other[-1, -1, -1] = 1
    boxes = Boxes(source.labels[::-1])
    further: list[dict[str, Any]] = [{}, {"m": mask}, {"m": other}, {"b": mask}, {"m": boxes}, {"m": boxes, "n": mask}]
    assert len({precompute.fingerprint(source, parts) for parts in further}) == 6
    assert precompute.fingerprint(source, {}) == precompute.fingerprint(source)
    assert precompute.fingerprint(source, {"m": mask.copy()}) == precompute.fingerprint(source, {"m": mask})


def test_parts_may_differ_in_length_and_labels_be_left_out(tmp_path: Path) -> None:
    data = BoxedDigits(batch_size=10)
    labels = data.split("test").labels
    batch = next(iter(data.test_dataloader()))
    assert list(batch) == ["images", "boxes"]
    assert [len(boxes) for boxes in batch["boxes"]] == labels[:10].tolist()
    ready = data.on_after_batch_transfer(batch, 0)
    assert ready["images"].dtype == torch.float32
    assert batch["images"].dtype == torch.uint8
    assert all(torch.equal(boxes, torch.full_like(boxes, i)) for i, boxes in enumerate(ready["boxes"]))

    def compute(batch: dict[str, Any]) -> dict[str, Tensor]:
        assert len(batch["images"]) == len(batch["boxes"]) == 10
        return {"count": torch.tensor([[float(len(boxes))] for boxes in batch["boxes"]])}

    kept = data.cache_features(compute, "x", directory=tmp_path, views=2)
    assert kept.arrays["count"][:1259, 0].tolist() == data.split("train").labels.tolist()


class Wrong(Digits):
    given: ClassVar[dict[str, Any]] = {}

    def further_parts(self, split: str, source: ImageSource) -> dict[str, Any]:
        return self.given


@pytest.mark.parametrize(
    ("parts", "maps", "given", "message"),
    [
        (
            ("images", "mask"),
            (),
            {},
            r"parts=\('images', 'mask'\) must be.* further_parts gives for val, which is \[\]",
        ),
        (("images",), (), {"mask": np.zeros(179)}, r"must be .* which is \['mask'\]"),
        (("labels",), (), {}, r"parts=\('labels',\) must be 'images'"),
        (("images", "mask"), ("map",), {"mask": np.zeros(179)}, r"maps=\('map',\) must be some of .*\['mask'\]"),
        (("images", "mask"), (), {"mask": np.zeros(9)}, "the part 'mask' has 9 rows for 179 images"),
        (
            ("images", "mask"),
            ("mask",),
            {"mask": np.zeros((179, 4, 4))},
            r"'mask' lies on the images' grid, so its shape must end in \(8, 8\), got \(4, 4\); give it at the size",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(
    monkeypatch: pytest.MonkeyPatch, parts: Any, maps: Any, given: Any, message: str
) -> None:
    monkeypatch.setattr(Wrong, "parts", parts)
    monkeypatch.setattr(Wrong, "maps", maps)
    monkeypatch.setattr(Wrong, "given", given)
    with pytest.raises(ValueError, match=message):
        Wrong().dataset("val")


class Unlabelled(ImageDataModule):
    """Pictures alone."""

    parts = ("images",)

    def __init__(self, source: ImageSource, **options: Any) -> None:
        super().__init__(**options)
        self.source = source

    @property
    def native_input(self) -> ImageInput:
        return ImageInput(height=8, width=8)

    def load_splits(self) -> dict[str, ImageSource]:
        train, val = split_off(self.source, 0.25, self.class_names)
        return {"train": train, "val": val, "test": val}


def test_data_need_no_classes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    data = Unlabelled(ArraySource(pixels, None, "noise"), batch_size=5)
    assert (data.class_names, data.num_classes) == ([], 0)
    assert [len(data.split(name)) for name in ("train", "val")] == [15, 5]
    assert all(list(batch) == ["images"] for batch in (*epoch_of(data), *data.val_dataloader()))


def test_corrupt_pictures_without_classes_are_left_out_unless_all_are(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    source = FileSource(tmp_path, [f"{number}.png" for number in range(8)])
    Path(source.name(3)).write_bytes(b"nothing")
    data = Unlabelled(source, skip_corrupt=True, batch_size=2)
    assert sum(len(data.split(name)) for name in ("train", "val")) == 7
    for number in range(8):
        Path(source.name(number)).write_bytes(b"nothing")
    with pytest.raises(CorruptImageError, match="no image of val can be decoded; the first one is"):
        Unlabelled(source, skip_corrupt=True).split("val")


def test_parts_follow_the_pictures_that_corrupt_ones_leave(tmp_path: Path) -> None:
    class Numbered(ImageFolder):
        parts = ("images", "labels", "number")

        def further_parts(self, split: str, source: ImageSource) -> dict[str, Any]:
            return {"number": np.array([int(Path(key).stem) for key in source.keys()])}  # noqa: SIM118

    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("L", (8, 8), 10 * number).save(tmp_path / split / name / f"{number}.png")
    (tmp_path / "val/a/1.png").write_bytes(b"nothing")
    batch = Numbered(tmp_path, skip_corrupt=True).sample_batch("val", 9)
    assert batch["number"].tolist() == [0, 2, 0, 1, 2]
    assert torch.equal(batch["images"][:, 0, 0, 0].long(), 10 * batch["number"])
