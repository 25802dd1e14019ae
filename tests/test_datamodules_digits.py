from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cleave.datamodules import Digits
from cleave.deployment import ImageInput


@pytest.fixture(scope="module")
def digits() -> Digits:
    module = Digits(batch_size=100)
    module.setup()
    return module


def test_the_split_is_fixed_and_stratified(digits: Digits) -> None:
    counts = {name: np.bincount(digits.split(name).labels) for name in ("train", "val", "test")}
    assert {name: int(count.sum()) for name, count in counts.items()} == {"train": 1259, "val": 179, "test": 359}
    assert all(np.ptp(count) <= 6 for count in counts.values())
    other = Digits(seed=9)
    assert np.array_equal(other.split("test").pixels, digits.split("test").pixels)  # type: ignore[attr-defined]


def test_the_splits_are_scikit_learns_digits_each_once(digits: Digits) -> None:
    images = np.concatenate([digits.split(name).pixels for name in ("train", "val", "test")])  # type: ignore[attr-defined]
    labels = np.concatenate([digits.split(name).labels for name in ("train", "val", "test")])
    theirs = load_digits()
    expected = sorted((row.tobytes(), label) for row, label in zip(theirs.data.astype(int), theirs.target, strict=True))
    ours = np.rint(images.reshape(-1, 64) / 255 * 16).astype(int)
    assert sorted((row.tobytes(), label) for row, label in zip(ours, labels, strict=True)) == expected
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)


def test_native_input_has_the_training_images_statistics(digits: Digits) -> None:
    pixels = digits.split("train").pixels / 255  # type: ignore[attr-defined]
    assert digits.input == digits.native_input
    assert digits.input.shape == (1, 8, 8)
    assert digits.input.mean[0] == pytest.approx(pixels.mean(), abs=1e-3)
    assert digits.input.std[0] == pytest.approx(pixels.std(), abs=1e-3)


def test_bytes_of_the_originals(digits: Digits) -> None:
    assert digits.raw_image_bytes("test") == 64
    assert 64 < digits.image_file_bytes("test") < 200


def test_class_names(digits: Digits) -> None:
    assert digits.class_names == list("0123456789")
    assert digits.num_classes == 10


def test_a_color_backbones_input(digits: Digits) -> None:
    module = Digits()
    module.configure_input(ImageInput(height=32, width=32))
    batch = module.sample_batch("test", 5)
    images, labels = batch["images"], batch["labels"]
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert labels.shape == (5,)
