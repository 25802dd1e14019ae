from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.utils.data._utils.pin_memory import pin_memory

from cleave.datamodules import (
    Digits,
    FeatureCache,
    FeatureCacheError,
    ImageDataModule,
    ImageFolder,
)
from cleave.datamodules.caching import feature_cache, precompute
from cleave.datamodules.sources import ArraySource, FileSource, ImageSource
from cleave.deployment import ImageInput

COUNT = 41
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Few(Digits):
    """The first few digits alone."""

    def load_splits(self) -> dict[str, ImageSource]:
        return {name: source.subset(np.arange(COUNT)) for name, source in super().load_splits().items()}


class Frozen(nn.Module):
    """What stands before the trained part: two features of different ranks."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.pool = nn.Conv2d(4, 6, 4)
        self.scale = scale
        self.calls = 0
        self.eval().requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        early = self.conv(batch["images"]) * self.scale
        return {"layer2.0": self.pool(early.relu()).flatten(1), "layer1": early}

    def digest(self) -> str:
        return hashlib.sha256(b"".join(v.numpy().tobytes() for v in self.state_dict().values())).hexdigest()


def cache(data: ImageDataModule, root: Path, network: Frozen | None = None, **options: Any) -> FeatureCache:
    network = network or Frozen()
    return data.cache_features(network, network.digest(), directory=root / "cache", **options)


def few(**options: Any) -> Few:
    return Few(**{"batch_size": 8, "augment": "none"} | options)


def epoch_of(data: ImageDataModule, epoch: int = 0) -> list[Any]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def plainly(batches: Iterable[dict[str, Any]]) -> bool:
    """Whether batches have no features."""
    return all(list(batch) == ["images", "labels"] for batch in batches)


def computed(data: ImageDataModule, network: Frozen, images: Tensor) -> dict[str, Tensor]:
    return network({"images": data.input.normalize(images)})


def entries(root: Path) -> list[Path]:
    return sorted((root / "cache").iterdir())


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first is second


# --- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 5e-4)])
def test_batches_bring_what_the_network_computes_of_their_images(tmp_path: Path, dtype: str, tolerance: float) -> None:
    data, network = few(), Frozen()
    plain = epoch_of(data, 3)
    kept = cache(data, tmp_path, network, dtype=dtype)
    assert kept.nbytes == COUNT * (4 * 4 * 4 + 6) * np.dtype(dtype).itemsize
    served = epoch_of(data, 3)
    assert len(served) == COUNT // 8
    for batch, before in zip(served, plain, strict=True):
        features = batch.pop("given")
        assert same(batch, before)
        expected = computed(data, network, batch["images"])
        assert set(features) == set(expected)
        for name, value in features.items():
            assert value.dtype == getattr(torch, dtype)
            torch.testing.assert_close(value.float(), expected[name], rtol=tolerance, atol=tolerance * 1e-3)


def test_without_images_no_picture_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = few(cache=False)
    cache(data, tmp_path)
    whole = epoch_of(data, 1)
    cache(data, tmp_path, images=False)
    monkeypatch.setattr(ArraySource, "picture", lambda *_: pytest.fail("a picture was read"))
    alone = epoch_of(data, 1)
    assert all(list(batch) == ["labels", "given"] for batch in alone)
    assert same(alone, [{name: batch[name] for name in ("labels", "given")} for batch in whole])


def test_evaluation_and_dropped_features_leave_batches_as_they_were(tmp_path: Path) -> None:
    data = few()
    plain = epoch_of(data)
    cache(data, tmp_path)
    assert all(plainly(data.eval_dataloader(split)) for split in ("train", "val", "test"))
    assert plainly([data.sample_batch("train", 3)])
    data.drop_features()
    assert same(epoch_of(data), plain)


def test_a_loader_made_before_serves_features_as_well(tmp_path: Path) -> None:
    data = few()
    loader = data.train_dataloader()
    cache(data, tmp_path)
    assert all(list(batch) == ["images", "labels", "given"] for batch in loader)


@pytest.mark.parametrize("images", [True, False])
def test_workers_do_not_change_the_batches(tmp_path: Path, images: bool) -> None:
    alone, helped = few(augment="crop"), few(augment="crop", num_workers=2)
    for data in (alone, helped):
        cache(data, tmp_path, views=2, images=images)
    for epoch in (0, 3):
        assert same(epoch_of(alone, epoch), epoch_of(helped, epoch))


def test_spawned_workers_get_the_path_and_not_the_values(tmp_path: Path) -> None:
    kept = cache(few(), tmp_path)
    assert kept.nbytes > 5000
    frozen = pickle.dumps(kept)
    assert len(frozen) < 500
    thawed = pickle.loads(frozen)  # noqa: S301
    assert same(thawed.batch([5, 0, 5]), kept.batch([5, 0, 5]))
    base = thawed.arrays["layer1"]
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.mode == "r"


def test_features_are_copies(tmp_path: Path) -> None:
    kept = cache(few(), tmp_path)
    first = kept.batch([0])["layer1"]
    before = first.clone()
    first.zero_()
    assert torch.equal(kept.batch([0])["layer1"], before)


# --- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["crop", "randaugment", "imagenet"])
def test_an_epochs_view_is_that_epochs_augmentation(tmp_path: Path, augment: str) -> None:
    data, network = few(augment=augment, seed=5), Frozen()
    dataset = data.dataset("train")
    seen = [dataset.batch([(view, index) for index in range(COUNT)])["images"] for view in range(3)]
    orders = [[batch["images"].clone() for batch in epoch_of(data, epoch)] for epoch in range(5)]
    assert not torch.equal(seen[0], seen[1])
    kept = cache(data, tmp_path, network, views=3)
    assert len(kept.arrays["layer1"]) == 3 * COUNT
    for view in range(3):
        rows = kept.batch(np.arange(COUNT) + view * COUNT)
        for name, value in computed(data, network, seen[view]).items():
            torch.testing.assert_close(rows[name], value, rtol=1e-5, atol=1e-6)
    for epoch in range(5):
        served = epoch_of(data, epoch)
        assert (epoch < 3) == same([batch["images"] for batch in served], orders[epoch])
        for batch in served:
            assert same(batch["given"], computed(data, network, batch["images"]))


def test_views_keep_the_order_of_the_epoch(tmp_path: Path) -> None:
    data = few(augment="crop")
    labels = [torch.cat([batch["labels"] for batch in epoch_of(data, epoch)]) for epoch in range(4)]
    assert not torch.equal(labels[0], labels[2])
    cache(data, tmp_path, views=2)
    for epoch in range(4):
        assert torch.equal(torch.cat([batch["labels"] for batch in epoch_of(data, epoch)]), labels[epoch])


@pytest.mark.parametrize(
    ("augment", "options", "message"),
    [
        ("crop", {}, r"augment='crop' draws other images in every epoch.*augment='none', or give views=k"),
        ("none", {"views": 3}, "views=3 would all be the same with augment='none'"),
        ("crop", {"views": 0}, "views must be a positive integer or None, got 0"),
        ("crop", {"views": 1.5}, "views must be a positive integer or None, got 1.5"),
        ("none", {"dtype": "bfloat16"}, r"dtype must be one of \['float16', 'float32'\], got 'bfloat16'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    tmp_path: Path, augment: str, options: dict[str, Any], message: str
) -> None:
    network = Frozen()
    with pytest.raises(ValueError, match=message):
        cache(few(augment=augment), tmp_path, network, **options)
    assert network.calls == 0
    assert not (tmp_path / "cache").exists()


# --- what makes an entry fit ------------------------------------------------------------------------------------------


def test_the_same_run_computes_nothing_again(tmp_path: Path) -> None:
    first, second = few(augment="crop"), few(augment="crop", num_workers=1, batch_size=10)
    cache(first, tmp_path, views=2)
    network = Frozen()
    cache(second, tmp_path, network, views=2)
    assert network.calls == 1  # of the few images that an entry is held against
    assert len(entries(tmp_path)) == 1
    second.batch_size = first.batch_size
    second.num_workers = 0
    assert same(epoch_of(first, 1), epoch_of(second, 1))


class Relabelled(Few):
    def load_splits(self) -> dict[str, ImageSource]:
        splits = super().load_splits()
        splits["train"].labels = splits["train"].labels[::-1].copy()
        return splits


class Repainted(Few):
    def load_splits(self) -> dict[str, ImageSource]:
        splits = super().load_splits()
        splits["train"].pixels[7, 3, 3] ^= 1  # type: ignore[attr-defined]
        return splits


@pytest.mark.parametrize(
    "change",
    [
        lambda root: cache(few(augment="crop"), root, Frozen(1), views=2),
        lambda root: cache(few(augment="crop"), root, views=3),
        lambda root: cache(few(augment="crop"), root, views=2, dtype="float16"),
        lambda root: cache(few(augment="crop", seed=1), root, views=2),
        lambda root: cache(few(augment="crop_flip"), root, views=2),
        lambda root: cache(few(), root),
        lambda root: cache(few(augment="crop", mean=(0.4,)), root, views=2),
        lambda root: cache(few(augment="crop", interpolation="nearest"), root, views=2),
        lambda root: cache(Relabelled(batch_size=8, augment="crop"), root, views=2),
        lambda root: cache(Repainted(batch_size=8, augment="crop"), root, views=2),
    ],
    ids=["weights", "views", "dtype", "seed", "augment", "no augment", "mean", "filter", "labels", "pixels"],
)
def test_whatever_changes_is_computed_anew(tmp_path: Path, change: Any) -> None:
    cache(few(augment="crop"), tmp_path, views=2)
    change(tmp_path)
    assert len(entries(tmp_path)) == 2


def test_other_features_of_the_same_network_are_another_entry(tmp_path: Path) -> None:
    data, network = few(), Frozen()
    cache(data, tmp_path, network)
    data.cache_features(lambda x: {"layer1": network(x)["layer1"]}, network.digest(), directory=tmp_path / "cache")
    data.cache_features(
        lambda x: {"layer1": network(x)["layer1"].flatten(1)}, network.digest(), directory=tmp_path / "cache"
    )
    assert len(entries(tmp_path)) == 3
    assert epoch_of(data)[0]["given"]["layer1"].shape == (8, 64)


def test_the_seed_is_of_no_matter_without_augmentation(tmp_path: Path) -> None:
    cache(few(seed=0), tmp_path)
    cache(few(seed=1), tmp_path)
    assert len(entries(tmp_path)) == 1


def test_a_wrong_fingerprint_is_found_out(tmp_path: Path) -> None:
    few().cache_features(Frozen(0), "same", directory=tmp_path / "cache")
    with pytest.raises(FeatureCacheError, match="does not hold what the network computes as 'layer1'; delete"):
        few().cache_features(Frozen(1), "same", directory=tmp_path / "cache")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.png")
    return tmp_path / "data"


def files(root: Path) -> FileSource:
    found = ImageFolder(root).split("train")
    assert isinstance(found, FileSource)
    return found


def test_files_are_known_by_name_size_time_and_label(tree: Path) -> None:
    before = precompute.fingerprint(files(tree))
    assert precompute.fingerprint(files(tree)) == before
    moved = tree.rename(tree.parent / "elsewhere")
    assert precompute.fingerprint(files(moved)) == before
    image = moved / "train/a/1.png"
    stat = image.stat()
    seen = {before}
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    seen.add(precompute.fingerprint(files(moved)))
    image.write_bytes(image.read_bytes() + b"\0")
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.add(precompute.fingerprint(files(moved)))
    image.rename(moved / "train/b/9.png")
    seen.add(precompute.fingerprint(files(moved)))
    assert len(seen) == 4


def test_a_folder_of_images_is_cached_too(tree: Path, tmp_path: Path) -> None:
    def network(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": batch["images"].mean((2, 3))}

    data = ImageFolder(tree, batch_size=4, augment="none", cache=False)
    data.cache_features(network, "mean", directory=tmp_path / "cache")
    for batch in epoch_of(data):
        assert same(batch["given"], network({"images": data.input.normalize(batch["images"])}))


def test_other_sources_are_known_by_their_pictures(tree: Path) -> None:
    class Wrapped(ImageSource):
        def __init__(self, of: ArraySource) -> None:
            super().__init__(of.labels)
            self.of = of

        name = shape = file_bytes = subset = None  # type: ignore[assignment]

        def keys(self) -> list[str]:
            return self.of.keys()

        def picture(self, index: int) -> Image.Image:
            return self.of.picture(index)

    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    first = precompute.fingerprint(Wrapped(ArraySource(pixels, [0, 1, 0], "x")))
    assert precompute.fingerprint(Wrapped(ArraySource(pixels.copy(), [0, 1, 0], "y"))) == first
    pixels[2, 3, 3] += 1
    assert precompute.fingerprint(Wrapped(ArraySource(pixels, [0, 1, 0], "x"))) != first


# --- folders that do not fit ------------------------------------------------------------------------------------------


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/notes.txt").write_text("mine")
    with pytest.raises(FeatureCacheError, match=r"is no feature cache: it holds \['notes.txt'\]; give a new or empty"):
        cache(few(), tmp_path)
    assert [path.name for path in entries(tmp_path)] == ["notes.txt"]


def test_a_file_and_an_entry_are_refused_as_the_cache(tmp_path: Path) -> None:
    entry = cache(few(), tmp_path).folder
    with pytest.raises(FeatureCacheError, match=f"is one entry of a feature cache; give '{tmp_path / 'cache'}'"):
        few().cache_features(Frozen(), "x", directory=entry)
    with pytest.raises(FeatureCacheError, match=r"meta.json' is a file; give a folder"):
        few().cache_features(Frozen(), "x", directory=entry / "meta.json")


def test_an_entry_of_another_run_is_not_used(tmp_path: Path) -> None:
    mine, other = cache(few(), tmp_path, Frozen(0)).folder, cache(few(), tmp_path, Frozen(1)).folder
    shutil.rmtree(mine)
    other.rename(mine)
    data = few()
    with pytest.raises(FeatureCacheError, match=r"belongs to another run: it differs in network \(.*; delete"):
        cache(data, tmp_path, Frozen(0))
    assert plainly(epoch_of(data))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def without_header(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def of_another_shape(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("0.npy", cut_short, "is damaged or cut short"),
        ("1.npy", lambda path: os.truncate(path, 0), "is damaged or cut short"),
        ("1.npy", without_header, "is damaged or cut short"),
        ("1.npy", lambda path: path.write_bytes(path.read_bytes() + b"x"), "has bytes behind its array"),
        ("1.npy", of_another_shape, r"holds 'layer2.0' as float32 \[40, 6\] instead of float32 \[41, 6\]"),
        ("0.npy", Path.unlink, "is not there"),
        ("meta.json", Path.unlink, "cannot be read"),
        ("meta.json", cut_short, "cannot be read"),
        ("meta.json", lambda path: path.write_text("[]"), "does not describe a feature cache"),
    ],
)
def test_a_damaged_entry_is_told_and_not_used(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    folder = cache(few(), tmp_path).folder
    damage(folder / name)
    data = few()
    with pytest.raises(FeatureCacheError, match=f"{message}.*; delete {folder} and it is computed anew"):
        cache(data, tmp_path)
    assert plainly(epoch_of(data))
    shutil.rmtree(folder)
    cache(data, tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    folder = cache(few(), tmp_path).folder
    np.save(folder / "0.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(FeatureCacheError, match="is damaged or cut short"):
        cache(few(), tmp_path)


def test_an_entry_says_what_it_is(tmp_path: Path) -> None:
    folder = cache(few(), tmp_path).folder
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["features"] == {"layer1": [COUNT, 4, 4, 4], "layer2.0": [COUNT, 6]}
    assert meta["transform"]["input"]["height"] == 8
    assert sorted(path.name for path in folder.iterdir()) == ["0.npy", "1.npy", "meta.json"]


# --- what goes wrong while writing ------------------------------------------------------------------------------------


def test_a_disk_too_small_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    network = Frozen()
    (tmp_path / "cache" / ".partial-0123456789abcdef-01234567").mkdir(parents=True)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage(9999, 999, 9000))
    with pytest.raises(
        FeatureCacheError,
        match=r"caching the features \['layer1', 'layer2.0'\] takes 11,480 bytes in .*cache, where 9,000 are free"
        r".*dtype=float16.*\.partial-0123",
    ):
        cache(few(), tmp_path, network)
    assert network.calls == 1
    assert [path.name[0] for path in entries(tmp_path)] == ["."]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_runs_full_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(feature_cache.os, "fsync", full)
    with pytest.raises(FeatureCacheError, match=r"11,480 bytes in .*the disk ran full"):
        cache(few(), tmp_path)
    assert entries(tmp_path) == []
    monkeypatch.undo()
    cache(few(), tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_write_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def to_full(path: Path, *mode: str, **options: Any) -> Any:
        return opened(Path("/dev/full") if path.suffix == ".npy" and mode == ("wb",) else path, *mode, **options)

    monkeypatch.setattr(Path, "open", to_full)
    with pytest.raises(FeatureCacheError, match="the disk ran full"):
        cache(few(), tmp_path)
    assert entries(tmp_path) == []


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    network = Frozen()

    def interrupted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if network.calls == 3:
            raise KeyboardInterrupt
        return network(batch)

    with pytest.raises(KeyboardInterrupt):
        few().cache_features(interrupted, "x", directory=tmp_path / "cache")
    assert entries(tmp_path) == []


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureCacheError, match=r"'layer1' reaches .*, beyond the range of float16.*dtype=float32"):
        cache(few(), tmp_path, Frozen(scale=1e6), dtype="float16")
    assert entries(tmp_path) == []
    cache(few(), tmp_path, Frozen(scale=1e6))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureCacheError, match="'layer1' has values that are not finite"):
        cache(few(), tmp_path, Frozen(scale=float("nan")))
    assert entries(tmp_path) == []


def test_shapes_that_change_are_refused(tmp_path: Path) -> None:
    calls: Iterator[int] = iter(range(99))

    def growing(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": batch["images"].flatten(1)[:, : 4 + next(calls) // 2]}

    with pytest.raises(FeatureCacheError, match="the same names and shapes in every batch"):
        few().cache_features(growing, "x", directory=tmp_path / "cache")
    assert entries(tmp_path) == []


def test_of_two_runs_that_write_at_once_the_first_to_end_wins(tmp_path: Path) -> None:
    network = Frozen()

    def overtaken(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if network.calls == 3:
            cache(few(), tmp_path)
        return network(batch)

    data = few()
    data.cache_features(overtaken, network.digest(), directory=tmp_path / "cache")
    assert network.calls == 1 + -(-COUNT // 8)
    assert len(entries(tmp_path)) == 1
    for batch in epoch_of(data):
        assert same(batch["given"], computed(data, Frozen(), batch["images"]))


# --- under a trainer --------------------------------------------------------------------------------------------------


class Trained(pl.LightningModule):
    """A part behind the frozen one, which records what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)
        self.seen: list[tuple[int, int, bytes]] = []
        self.dtypes: list[torch.dtype] = []
        self.names: set[str] = set()

    def on_train_start(self) -> None:
        self.trainer.fit_loop._load_combined_loader_states()  # as `lightning_modules.base.Task` does, and why

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels, features = batch["labels"], batch["given"]
        images = [batch["images"]] if "images" in batch else []
        self.dtypes += [value.dtype for value in (*images, *features.values())]
        content = b"".join(value.numpy().tobytes() for value in (labels, *features.values()))
        self.seen.append((self.current_epoch, batch_idx, content))
        loss = nn.functional.cross_entropy(self.layer(features["layer1"].flatten(1)), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.names |= set(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        # Asked for the number of steps, Lightning makes the loaders before `on_fit_start`, where features are cached.
        total = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)]


class CachedTrained(Trained):
    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__()
        self.cache = lambda: cache(self.trainer.datamodule, root, **options)  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        self.cache()


def fit(root: Path, resume: Path | None = None, workers: int = 0, **options: Any) -> Trained:
    network = CachedTrained(root, **{"views": 2, "images": False} | options)
    data = few(augment="crop", num_workers=workers)
    saver = ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(max_epochs=3, num_sanity_val_steps=0, callbacks=[saver], accumulate_grad_batches=2, **QUIET)
    trainer.fit(network, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    data.trainer = None
    assert plainly(epoch_of(data))  # dropped at the fit's end
    return network


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_inside_an_epoch_sees_the_same_features(tmp_path: Path, workers: int) -> None:
    whole = fit(tmp_path)
    assert len(whole.seen) == 3 * 5
    assert whole.names == {"images", "labels", "pixels"}
    assert [content for epoch, _, content in whole.seen if epoch == 0] != [c for e, _, c in whole.seen if e == 2]
    for step in (2, 4, 7):
        resumed = fit(tmp_path, tmp_path / f"checkpoints/step={step}.ckpt", workers)
        assert 0 < len(resumed.seen) < len(whole.seen)
        assert whole.seen[-len(resumed.seen) :] == resumed.seen
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("images", [True, False])
def test_batches_survive_pinning_and_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: bool
) -> None:
    data = few()
    cache(data, tmp_path, images=images)
    batch = epoch_of(data)[0]
    assert ("images" in batch) == images
    assert extract_batch_size(batch) == 8
    assert same(move_data_to_device(batch, torch.device("cpu")), batch)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *_: tensor + 1)  # the real one needs a GPU
    pinned = pin_memory(batch)
    assert list(pinned) == list(batch)
    assert torch.equal(pinned["labels"], batch["labels"] + 1)
    assert torch.equal(pinned["given"]["layer1"], batch["given"]["layer1"] + 1)


def test_float16_features_reach_the_task_as_float32(tmp_path: Path) -> None:
    data = few()
    cache(data, tmp_path, images=False, dtype="float16")
    batch = epoch_of(data)[0]
    labels, features = batch["labels"], batch["given"]
    trainer = pl.Trainer(max_steps=2, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    network = CachedTrained(tmp_path, images=False, dtype="float16")
    trainer.fit(network, datamodule=data)
    assert set(network.dtypes) == {torch.float32}
    expected = (labels, *(value.float() for value in features.values()))
    assert network.seen[0][2] == b"".join(value.numpy().tobytes() for value in expected)


def test_features_are_computed_and_served_in_the_trainers_precision(tmp_path: Path) -> None:
    for precision in ("32-true", "64-true", "bf16-mixed"):
        trainer = pl.Trainer(max_steps=1, limit_val_batches=0, precision=precision, enable_checkpointing=False, **QUIET)
        network = Frozen().double() if precision == "64-true" else Frozen()
        task = CachedTrained(tmp_path, network=network)
        trainer.fit(task, datamodule=few())
        assert task.dtypes == [torch.float64 if precision == "64-true" else torch.float32] * 3
    values = {
        json.loads((entry / "meta.json").read_text())["arithmetic"]["precision"]: np.load(entry / "0.npy")
        for entry in entries(tmp_path)
    }
    assert set(values) == {"32-true", "64-true", "bf16-mixed"}
    rounded = torch.from_numpy(values["bf16-mixed"])
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not np.array_equal(values["bf16-mixed"], values["32-true"])


class FakeStrategy:
    """Two ranks one after the other: what rank 0 says is what rank 1 hears."""

    said: Any = None

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            FakeStrategy.said = pickle.dumps(value)
        return pickle.loads(FakeStrategy.said)  # noqa: S301


class FakeTrainer:
    precision = "32-true"
    world_size = 2
    overfit_batches = 0

    def __init__(self, rank: int) -> None:
        self.global_rank, self.is_global_zero = rank, rank == 0
        self.strategy = FakeStrategy(rank)
        self.precision_plugin = pl.plugins.Precision()


def test_rank_zero_computes_for_all(tmp_path: Path) -> None:
    networks, modules = (Frozen(), Frozen()), (few(), few())
    for rank, (data, network) in enumerate(zip(modules, networks, strict=True)):
        data.trainer = FakeTrainer(rank)  # type: ignore[assignment]
        cache(data, tmp_path, network)
    assert networks[0].calls == 1 + -(-COUNT // 8)
    assert networks[1].calls == 0
    shares = [epoch_of(data) for data in modules]
    assert [len(share) for share in shares] == [2, 2]
    for batch in shares[0] + shares[1]:
        assert same(batch["given"], computed(modules[0], networks[0], batch["images"]))
    assert not same(shares[0], shares[1])


def test_every_rank_hears_what_went_wrong(tmp_path: Path) -> None:
    for rank, message in ((0, "'layer1' has values"), (1, "rank 0 could not cache.*'layer1' has values")):
        data = few()
        data.trainer = FakeTrainer(rank)  # type: ignore[assignment]
        with pytest.raises(FeatureCacheError, match=message):
            cache(data, tmp_path, Frozen(scale=float("inf")))


def test_a_rank_that_cannot_reach_the_folder_says_so(tmp_path: Path) -> None:
    for rank in (0, 1):
        data = few()
        data.trainer = FakeTrainer(rank)  # type: ignore[assignment]
        if rank == 0:
            shutil.rmtree(cache(data, tmp_path).folder)
        else:
            with pytest.raises(FeatureCacheError, match="is not there; every rank must reach the folder"):
                cache(data, tmp_path)


@pytest.mark.slow
def test_two_devices_share_an_entry(tmp_path: Path) -> None:
    script = f"""
    import sys, warnings, torch, pytorch_lightning as pl
    from cleave.datamodules import Digits
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)
            self.computed, self.right = 0, True
        def features(self, batch):
            self.computed += 1
            return {{"twice": 2 * batch["images"]}}
        def on_fit_start(self):
            self.trainer.datamodule.cache_features(self.features, "twice", directory={str(tmp_path / "cache")!r})
        def training_step(self, batch):
            twice = batch["given"]["twice"]
            self.right &= torch.equal(twice, 2 * batch["images"])
            return torch.nn.functional.cross_entropy(self.layer(twice.flatten(1)), batch["labels"])
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)
    net = Net()
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer.fit(net, datamodule=Digits(batch_size=100, augment="none"))
    torch.save([net.computed, net.right, trainer.global_step], f"{tmp_path}/{{trainer.global_rank}}.pt")
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert torch.load(tmp_path / "0.pt", weights_only=True) == [1 + 13, True, 6]
    assert torch.load(tmp_path / "1.pt", weights_only=True) == [0, True, 6]


def test_an_input_configured_later_drops_the_features(tmp_path: Path) -> None:
    data = few()
    cache(data, tmp_path)
    data.configure_input(ImageInput(height=9, width=9, color_mode="L", mean=(0.5,), std=(0.5,)))
    assert plainly(epoch_of(data))
