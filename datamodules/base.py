"""The base of all data modules: one input description, exact order and resume, cached pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from pytorch_lightning.utilities.warnings import PossibleUserWarning
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from cleave.deployment import ImageInput

from .augment import Augmentation, check_preset
from .dataset import Batch, CachedBatch, ImageDataset, as_is, readable
from .feature_cache import (
    DTYPES,
    FORMAT,
    FeatureCache,
    FeatureCacheError,
    check_sample,
    check_views,
    fingerprint,
    open_entry,
    write_entry,
)
from .sampling import EpochLoader, EpochSampler, ShardSampler, even_batch_size
from .sources import CorruptImageError, ImageSource

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",), None: SPLITS}
_WORKER_ADVICE = r"The '\w+_dataloader' does not have many workers"


class ImageDataModule(pl.LightningDataModule):
    """Serves batches of normalised float32 images (B, C, H, W) with int64 labels (B,).

    The loader's own batches are uint8; :meth:`on_after_batch_transfer` normalises them on the device. Evaluation sees
    exactly what calling :attr:`input` on a picture gives, so that a bundle's accuracy is the checkpoint's.

    The order of training images depends on (seed, epoch) and an image's augmentation on (seed, epoch, index), whatever
    the number of workers; a run resumed inside an epoch goes on with the first batch that training had not consumed.
    Across devices every rank serves its own share: in evaluation no image is served twice.

    A subclass gives :attr:`native_input` and :meth:`load_splits`.

    Args:
        batch_size: Images in a training batch, per device.
        eval_batch_size: Images in an evaluation batch, per device; ``None`` takes ``batch_size``.
        num_workers: Worker processes of each loader; they live as long as the training loader does.
        pin_memory: Page-lock batches for the copy to a GPU; without a GPU it has no effect.
        drop_last: Leave out the last, smaller batch of a training epoch, which BatchNorm takes ill.
        seed: Seed of order and augmentation; the splits do not depend on it.
        augment: A preset: ``none``, ``crop`` (padded by an eighth, for digits), ``crop_flip``, ``randaugment`` or
            ``trivial`` (both after ``crop_flip``), ``imagenet`` (random resized crop, flip), ``imagenet_randaugment``,
            ``imagenet_trivial``.
        image_size: Side of the input in pixels, or (height, width); overrides the backbone's, and a resize in
            proportion.
        mean: Per-channel mean that overrides the backbone's.
        std: Per-channel standard deviation that overrides the backbone's.
        interpolation: Resize filter that overrides the backbone's.
        cache: Keep decoded pictures in memory, shared with the workers: ``True``, ``False``, or ``"auto"``: splits of
            at most 1 GiB decoded.
        skip_corrupt: Leave out pictures that cannot be decoded, and say how many, instead of an error. Every picture
            of a split is then decoded once when the split is first used.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = True,
        seed: int = 0,
        augment: str = "none",
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        cache: bool | str = "auto",
        skip_corrupt: bool = False,
    ) -> None:
        super().__init__()
        check_preset(augment)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(cache, bool) and cache != "auto":
            raise ValueError(f"cache must be True, False or 'auto', got {cache!r}")
        # Not to the logger: Lightning refuses to log a name (`seed`) that data and network module give two values.
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.seed = seed
        self.augment = augment
        self.cache = cache
        self.skip_corrupt = skip_corrupt
        self.overrides = _overrides(image_size, mean, std, interpolation)
        self._configured: ImageInput | None = None
        self._found: dict[str, ImageSource] | None = None
        self._splits: dict[str, ImageSource] = {}
        self._datasets: dict[str, ImageDataset] = {}

    # --- what a data set says ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the labels."""

    @property
    @abstractmethod
    def native_input(self) -> ImageInput:
        """The input that suits these pictures when no backbone says otherwise."""

    @abstractmethod
    def load_splits(self) -> dict[str, ImageSource]:
        """Find the pictures of ``train``, ``val`` and ``test``; called once."""

    # --- the input --------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input(self) -> ImageInput:
        """The input in use: the configured or the native one, with the overrides given to the constructor."""
        spec = self._configured or self.native_input
        changes = dict(self.overrides)
        if spec.resize is not None and "height" in changes and "resize" not in changes:
            scale = max(changes["height"] / spec.height, changes["width"] / spec.width)
            changes["resize"] = max(round(spec.resize * scale), changes["height"], changes["width"])
        return dataclasses.replace(spec, **changes)

    def configure_input(self, spec: ImageInput) -> None:
        """Take over the input that a pretrained backbone was trained with; overrides of the constructor still win.

        What was cached for another input is dropped.

        Args:
            spec: Size, resize, crop, interpolation, colour mode, mean and std of the backbone.

        Raises:
            ValueError: An override does not fit, such as one mean for a backbone of three channels.
        """
        before, self._configured = self._configured, spec
        try:
            now = self.input
        except ValueError:
            self._configured = before
            raise
        if any(dataset.spec != now for dataset in self._datasets.values()):
            self._datasets.clear()

    # --- the pictures -----------------------------------------------------------------------------------------------

    def split(self, name: str) -> ImageSource:
        """Return the pictures of ``train``, ``val`` or ``test``.

        Raises:
            ValueError: The data are missing or laid out otherwise than the class says, or the split is unknown.
        """
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; known are {list(SPLITS)}")
        if self._found is None:
            self._found = self.load_splits()
        if name not in self._splits:
            source = self._found[name]
            self._splits[name] = self._leave_out_corrupt(name, source) if self.skip_corrupt else source
        return self._splits[name]

    def image_file_bytes(self, split: str = "test") -> float:
        """Return the mean size of the original image files of a split in bytes (as PNG where there are no files)."""
        source = self.split(split)
        return float(np.mean([source.file_bytes(index) for index in range(len(source))]))

    def raw_image_bytes(self, split: str = "test") -> float:
        """Return the mean of rows x columns x channels of a split's original pictures: their uint8 bytes."""
        source = self.split(split)
        return float(np.mean([np.prod(source.shape(index)) for index in range(len(source))]))

    def sample_images(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` images at even distances through a split, as evaluation sees them.

        Returns:
            uint8 images (count, C, H, W), fewer if the split has fewer, and their int64 labels.
        """
        dataset = self.dataset(split).without_augmentation()
        return dataset.batch(dataset.source.spaced(count).tolist())

    def dataset(self, split: str) -> ImageDataset:
        """Return the dataset of a split, decoding and caching it at the first call.

        Raises:
            CorruptImageError: A picture cannot be decoded; the message names it.
        """
        if split not in self._datasets:
            spec = self.input
            self._datasets[split] = ImageDataset(
                self.split(split),
                spec,
                augmentation=Augmentation(self.augment, spec) if split == "train" and self.augment != "none" else None,
                seed=self.seed,
                cache=self.cache,
            )
        return self._datasets[split]

    def _leave_out_corrupt(self, split: str, source: ImageSource) -> ImageSource:
        source, bad = readable(source)
        if bad:
            left = np.bincount(source.labels, minlength=self.num_classes)
            if empty := [name for name, count in zip(self.class_names, left, strict=True) if count == 0]:
                raise CorruptImageError(f"no image of {empty} in {split} can be decoded; the first one is {bad[0]}")
            say(f"{split}: left out {len(bad)} corrupt image(s), the first is {bad[0]}")
        return source

    # --- features of frozen parts -----------------------------------------------------------------------------------

    def cache_features(
        self,
        compute: Callable[[Tensor], Mapping[str, Tensor]],
        network: str,
        *,
        directory: str | Path,
        dtype: str = "float32",
        views: int | None = None,
        images: bool = True,
        device: torch.device | str = "cpu",
    ) -> FeatureCache:
        """Compute what frozen parts make of the training images once, or find it, and serve it with them from now on.

        Training batches become (images, labels, features), features (B, ...) by name in the trainer's precision; all
        other batches stay as they are. It lasts until the fit ends, :meth:`drop_features` or another input is
        configured, and reaches loaders that were made before but not iterated. Across devices every rank must call it:
        rank 0 computes.

        Where kernels depend on the shape of a batch alone, float32 features equal those computed in training bit by
        bit, as they are computed in whole batches of ``batch_size`` too; otherwise they differ by rounding, about 1e-6.

        Args:
            compute: Maps normalised images (B, C, H, W) on ``device`` to features (B, ...) by name. It must be in eval
                mode; it runs without gradients, in the trainer's precision.
            network: Digest of all that ``compute`` depends on: its weights, buffers and cuts.
            directory: Folder of the cache, which many runs may share. An entry may be deleted when no run uses it.
            dtype: ``float32``, or ``float16`` for half the bytes and relative errors of up to 5e-4.
            views: Where the augmentation is random: fixed augmented views per image. Epoch e serves view e modulo
                ``views``: the images that epoch e modulo ``views`` has without a cache, in the order of epoch e.
            images: ``False`` puts ``None`` in the images' place and decodes none of them.
            device: Where to compute.

        Returns:
            The entry in use.

        Raises:
            FeatureCacheError: ``directory`` is in use for something else, an entry is damaged or belongs to another
                run, the disk is full, or a value lies beyond the range of ``dtype``.
            ValueError: The augmentation is random and ``views`` not given, or an argument is out of range.
        """
        views = check_views(views, self.augment)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        root, device = Path(directory).absolute(), torch.device(device)
        self.drop_features()
        dataset = self.dataset("train")
        components = {"format": FORMAT, "network": network, "dtype": dtype, **self._circumstances(views, device)}
        features = functools.partial(self._features, compute, device)
        cache = self._on_rank_zero(lambda: self._find_or_compute(features, components, root))
        cache.arrays  # noqa: B018 - mapped before workers are forked, and a file that is missing is told at once
        dataset.features, dataset.with_images = cache, images
        return cache

    def drop_features(self) -> None:
        """Serve training images without cached features again."""
        if "train" in self._datasets:
            self._datasets["train"].features = None

    def _find_or_compute(
        self, features: Callable[[Batch], dict[str, Tensor]], components: dict[str, Any], root: Path
    ) -> FeatureCache:
        dataset = self.dataset("train")
        views = components["transform"]["views"]
        rows = dataset.source.spaced(min(4, self.batch_size))
        sample = features(dataset.batch([(0, index) for index in rows.tolist()]))
        shapes = {name: [views * len(dataset), *value.shape[1:]] for name, value in sample.items()}
        components = components | {"data": fingerprint(dataset.source), "features": shapes}
        cache = open_entry(root, components)
        if cache is not None:
            check_sample(cache, rows, sample)
            say(f"features {cache.names} of the training images are taken from {cache.folder}")
            return cache
        keys = itertools.product(range(views), range(len(dataset)))
        loader = self._loader(DataLoader, dataset, keys, self.batch_size, persistent=False)
        total = math.ceil(views * len(dataset) / self.batch_size)
        shown = track(loader, "Caching features", total, transient=True, disable=not sys.stdout.isatty())
        cache = write_entry(root, components, map(features, shown))
        say(f"features {cache.names} of the training images are cached in {cache.folder}: {cache.nbytes:,} bytes")
        return cache

    def _features(
        self, compute: Callable[[Tensor], Mapping[str, Tensor]], device: torch.device, batch: Batch
    ) -> dict[str, Tensor]:
        images, count = batch[0], len(batch[0])
        # Filled up to a whole batch, since kernels, and so the last bits, go by the batch's shape.
        images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        images = self._in_precision(self.input.normalize(images.to(device)))
        plugin = None if self.trainer is None else self.trainer.precision_plugin
        with torch.no_grad(), contextlib.nullcontext() if plugin is None else plugin.forward_context():
            return {name: value[:count] for name, value in compute(images).items()}

    def _circumstances(self, views: int, device: torch.device) -> dict[str, Any]:
        """What features depend on besides the network and the pictures."""
        transform = {"input": dataclasses.asdict(self.input), "augment": self.augment, "views": views}
        transform["pillow"] = PIL.__version__
        if self.augment != "none":
            transform |= {"seed": self.seed, "torchvision": torchvision.__version__}
        precision = "32-true" if self.trainer is None else str(self.trainer.precision)
        arithmetic = {"device": device.type, "precision": precision, "torch": str(torch.__version__)}
        return {"transform": transform, "arithmetic": arithmetic}

    def _on_rank_zero(self, make: Callable[[], FeatureCache]) -> FeatureCache:
        """Return on every rank what ``make`` gives on rank 0, or raise what it ends in there."""
        if self.trainer is None:
            return make()
        made: FeatureCache | None = None
        failure: Exception | None = None
        if self.trainer.is_global_zero:
            try:
                made = make()
            except Exception as error:  # told to the other ranks first, or they would wait for ever
                failure = error
        made, reason = self.trainer.strategy.broadcast((made, failure and f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        if made is None:
            raise FeatureCacheError(f"rank 0 could not cache the features: {reason}")
        return made

    # --- what Lightning calls ---------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Decode and cache the splits of a stage, so that a broken picture is found before any training."""
        for split in _STAGE_SPLITS[stage]:
            self.dataset(split)

    def teardown(self, stage: str | None = None) -> None:
        """Drop cached features at the end of a fit: another task's frozen parts are others."""
        if stage == "fit":
            self.drop_features()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch | CachedBatch:
        """Normalise a batch on its device, in the trainer's precision, to which cached features are brought as well."""
        images, labels, *cached = batch
        if images is not None:
            images = self._in_precision(self.input.normalize(images))
        if not cached:
            return images, labels
        return images, labels, {name: self._in_precision(value.float()) for name, value in cached[0].items()}

    def train_dataloader(self) -> DataLoader:
        """Return the loader of augmented training batches.

        Raises:
            ValueError: ``drop_last`` leaves no batch.
        """
        dataset = self.dataset("train")
        if self._overfits():
            # Lightning's switch for debugging replaces any sampler but this one: the same images in every epoch.
            return self._loader(DataLoader, dataset, SequentialSampler(dataset), self.batch_size, persistent=True)
        ranks, rank = self._ranks()
        sampler = EpochSampler(dataset, seed=self.seed, drop_last=self.drop_last, num_replicas=ranks, rank=rank)
        if self.drop_last and len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} on {ranks} device(s) leaves no whole batch of {len(dataset)} training "
                f"images; use a batch_size of at most {len(sampler)} or drop_last=False"
            )
        options: dict[str, Any] = {"drop_last": self.drop_last, "progress": self._progress}
        return self._loader(EpochLoader, dataset, sampler, self.batch_size, persistent=True, **options)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation split."""
        return self.eval_dataloader("val", persistent=True)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test split."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of the test split."""
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: str, persistent: bool = False) -> DataLoader:
        """Return a loader of uint8 batches over a whole split in order, without augmentation.

        Args:
            split: ``train``, ``val`` or ``test``.
            persistent: Keep the workers between epochs.
        """
        dataset = self.dataset(split).without_augmentation()
        ranks, rank = self._ranks()
        if ranks == 1 or self._overfits():
            return self._loader(
                DataLoader, dataset, SequentialSampler(dataset), self.eval_batch_size, persistent=persistent
            )
        sampler = ShardSampler(dataset, num_replicas=ranks, rank=rank)
        batch_size = even_batch_size(len(dataset), ranks, self.eval_batch_size)
        return self._loader(DataLoader, dataset, sampler, batch_size, persistent=persistent)

    def _loader(
        self,
        kind: type[DataLoader],
        dataset: ImageDataset,
        sampler: Any,
        batch_size: int,
        *,
        persistent: bool,
        **more: Any,
    ) -> DataLoader:
        if dataset.cache is not None:
            # Lightning's advice is right where pictures are decoded on the way; from memory, workers only cost.
            warnings.filterwarnings("ignore", _WORKER_ADVICE, PossibleUserWarning)
        return kind(
            dataset,
            sampler=sampler,
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=as_is,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=persistent and self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else each iterator draws from the global generator
            **more,
        )

    def _in_precision(self, values: Tensor) -> Tensor:
        return values if self.trainer is None else self.trainer.precision_plugin.convert_input(values)

    def _ranks(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _overfits(self) -> bool:
        return self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]

    def _progress(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready


def _overrides(
    image_size: int | Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
        changes["height"], changes["width"] = sides
    if mean is not None:
        changes["mean"] = tuple(mean)
    if std is not None:
        changes["std"] = tuple(std)
    if interpolation is not None:
        changes["interpolation"] = interpolation
    return changes


@rank_zero_only
def say(message: str) -> None:
    """Log one line on rank zero about how the data are used."""
    log.info(message)
