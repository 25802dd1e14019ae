from __future__ import annotations

import hashlib
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from cleave.datamodules import CIFAR10
from cleave.datamodules.sets.cifar10 import CLASSES


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out like the unpacked archive, with 100 training and 40 test images."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(count: int) -> dict[str, object]:
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [index % 10 for index in range(count)]}

    train = [write(f"data_batch_{number}", batch(20)) for number in range(1, 6)]
    meta = write("batches.meta", {"label_names": list(CLASSES)})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch(40))])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path


@pytest.mark.parametrize(("val_from", "sizes"), [("train", (80, 20, 40)), ("test", (100, 20, 20))])
def test_validation_images_come_from_train_or_test(archive: Path, val_from: str, sizes: tuple[int, int, int]) -> None:
    module = CIFAR10(archive, val_from=val_from, val_fraction=0.2)
    module.prepare_data()
    module.setup()
    assert tuple(len(module.split(name)) for name in ("train", "val", "test")) == sizes
    for name in ("train", "val", "test"):
        assert np.ptp(np.bincount(module.split(name).labels)) == 0
    pixels = [image.tobytes() for name in ("train", "val", "test") for image in module.split(name).pixels]  # type: ignore[attr-defined]
    assert len(set(pixels)) == 140


def test_the_split_does_not_depend_on_the_seed(archive: Path) -> None:
    first, second = (CIFAR10(archive, seed=seed).split("val").pixels for seed in (0, 1))  # type: ignore[attr-defined]
    assert np.array_equal(first, second)


def test_images_and_bytes(archive: Path) -> None:
    module = CIFAR10(archive, batch_size=10)
    batch = next(iter(module.test_dataloader()))
    images, labels = batch["images"], batch["labels"]
    assert images.shape == (10, 3, 32, 32)
    assert np.array_equal(images.numpy().transpose(0, 2, 3, 1), module.split("test").pixels[:10])  # type: ignore[attr-defined]
    assert labels.tolist() == list(range(10))
    assert module.raw_image_bytes() == 3072
    assert module.image_file_bytes() > 3072  # noise does not compress
    assert module.class_names[3] == "cat"


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(
        ValueError, match=r"cannot download CIFAR-10 to root=.*no route to host.*without a network, put"
    ):
        CIFAR10(tmp_path).prepare_data()


def test_missing_data_is_named(tmp_path: Path) -> None:
    module = CIFAR10(tmp_path, download=False)
    module.prepare_data()
    with pytest.raises(ValueError, match=r"missing or corrupt in root=.*call prepare_data\(\) with download=True"):
        module.setup("fit")


def test_a_changed_byte_is_refused(archive: Path) -> None:
    path = archive / "cifar-10-batches-py/test_batch"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="missing or corrupt"):
        CIFAR10(archive, download=False).setup("test")


def test_unknown_source_of_validation_images() -> None:
    with pytest.raises(ValueError, match="val_from must be 'train' or 'test', got 'val'"):
        CIFAR10(val_from="val")
    with pytest.raises(ValueError, match="val_fraction must lie between 0 and 1, got 1"):
        CIFAR10(val_fraction=1)
