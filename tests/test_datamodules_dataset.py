from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cleave.datamodules import dataset as dataset_module
from cleave.datamodules.augment import PRESETS, Augmentation
from cleave.datamodules.caching.cache import PixelCache, in_threads
from cleave.datamodules.dataset import ImageDataset
from cleave.datamodules.sources import ArraySource, CorruptImageError, FileSource
from cleave.deployment import ImageInput

SPEC = ImageInput(height=6, width=8, resize=10)


@pytest.fixture
def files(tmp_path: Path) -> FileSource:
    """Pictures of three sizes, one of them grey."""
    generator = np.random.default_rng(0)
    shapes = [(12, 14, 3), (11, 17, 3), (13, 12)]
    for number in range(9):
        pixels = generator.integers(0, 256, shapes[number % 3], dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return FileSource(tmp_path, [f"{number}.png" for number in range(9)], [number % 2 for number in range(9)])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_cache_changes_nothing(files: FileSource, name: str) -> None:
    keys = [(epoch, index) for epoch in (0, 5) for index in range(9)]
    cached, plain = (
        ImageDataset(files, SPEC, augmentation=Augmentation(name, SPEC), seed=3, cache=cache) for cache in (True, False)
    )
    assert cached.cache is not None
    assert plain.cache is None
    first, second = cached.__getitems__(keys), plain.__getitems__(keys)
    assert first.keys() == second.keys() == {"images", "labels"}
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["crop", "imagenet"])
def test_without_augmentation_an_image_is_what_the_input_makes_of_the_picture(
    files: FileSource, name: str, cache: bool
) -> None:
    augmented = ImageDataset(files, SPEC, augmentation=Augmentation(name, SPEC), cache=cache)
    plain = augmented.without_augmentation()
    assert plain.cache is augmented.cache
    for index in range(9):
        sample = plain[index]
        assert torch.equal(sample["images"], SPEC(files.picture(index)))
        assert sample["labels"] == index % 2
    assert augmented.augmentation is not None


def test_one_key_gives_the_image_of_its_batch(files: FileSource) -> None:
    data = ImageDataset(files, SPEC, augmentation=Augmentation("randaugment", SPEC))
    batch = data.__getitems__([(1, 4), (1, 2)])
    sample = data[(1, 2)]
    assert torch.equal(batch["images"][1], sample["images"])
    assert batch["labels"][1] == sample["labels"]
    assert torch.equal(data[4]["images"], data[(0, 4)]["images"])


def test_batches_are_copies_of_the_cache(files: FileSource) -> None:
    data = ImageDataset(files, SPEC, cache=True)
    images = data.__getitems__([0, 1])["images"]
    before = images.clone()
    images.zero_()
    assert torch.equal(data.__getitems__([0, 1])["images"], before)


@pytest.mark.parametrize("name", ["crop", "imagenet"])
def test_auto_caches_below_its_bound(files: FileSource, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    augmentation = Augmentation(name, SPEC)
    exact = ImageDataset(files, SPEC, augmentation=augmentation, cache=True).cache
    assert exact is not None
    monkeypatch.setattr(dataset_module, "AUTO_CACHE_BYTES", exact.nbytes)
    assert ImageDataset(files, SPEC, augmentation=augmentation).cache is not None
    monkeypatch.setattr(dataset_module, "AUTO_CACHE_BYTES", exact.nbytes - 1)
    assert ImageDataset(files, SPEC, augmentation=augmentation).cache is None


def test_random_crops_cache_the_originals_and_fixed_crops_the_inputs(files: FileSource) -> None:
    originals = ImageDataset(files, SPEC, augmentation=Augmentation("imagenet", SPEC), cache=True).cache
    inputs = ImageDataset(files, SPEC, augmentation=Augmentation("crop_flip", SPEC), cache=True).cache
    assert originals is not None
    assert inputs is not None
    assert originals[1].shape == (11, 17, 3)
    assert inputs[1].shape == (3, 6, 8)
    assert inputs.nbytes == 9 * 3 * 6 * 8


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 3)], [(2, 3), (4, 1)]])
def test_a_cache_survives_pickling(shapes: list[tuple[int, int]]) -> None:
    cache = PixelCache(shapes)
    cache.fill(lambda index: np.full(shapes[index], index + 1, dtype=np.uint8))
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert len(copy) == 2
    assert all(np.array_equal(copy[index], cache[index]) for index in range(2))
    assert np.shares_memory(copy[0], copy.pixels)


def test_threads_keep_the_order_and_report_only_corrupt_images() -> None:
    def work(index: int) -> None:
        if index % 100 == 99:
            raise CorruptImageError(str(index))

    outcome = list(in_threads(work, 300))
    assert [index for index, error in enumerate(outcome) if error] == [99, 199, 299]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda index: 1 // index, 3))


def test_a_file_that_is_gone_is_not_called_corrupt(files: FileSource) -> None:
    Path(files.name(3)).unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        ImageDataset(files, SPEC, cache=True)
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        files.shape(3)


def test_a_broken_header_is_corrupt(files: FileSource) -> None:
    Path(files.name(3)).write_bytes(b"nothing")
    with pytest.raises(CorruptImageError, match=r"3\.png"):
        files.shape(3)


def test_spaced_indices_reach_from_end_to_end() -> None:
    source = ArraySource(np.zeros((10, 2, 2), dtype=np.uint8), [0] * 10, "test")
    assert source.spaced(4).tolist() == [0, 3, 6, 9]
    assert source.spaced(99).tolist() == list(range(10))
    assert source.name(3) == "test image 3"
