"""Features of frozen parts over a whole training split: found on disk, or computed there once for all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytorch_lightning as pl
import torch
import torchvision
from lightning_fabric.utilities import move_data_to_device
from rich.progress import track
from torch import Tensor

from ..arguments import is_whole
from ..dataset import Batch, ImageDataset, Values
from ..sampling import Loaders
from ..sources import ArraySource, FileSource, ImageSource
from .feature_cache import DTYPES, FORMAT, FeatureCache, FeatureCacheError, check_sample, open_entry, write_entry

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Precomputation:
    """What frozen parts make of a training split, in whole batches and in the trainer's precision.

    Args:
        compute: Maps a batch as training gets it to features (B, ...) by name.
        network: Digest of all that ``compute`` depends on.
        dataset: The training split.
        loaders: What loads its batches.
        batch_size: Samples that ``compute`` is given at a time.
        prepare: Normalises the images of a batch, in the trainer's precision.
        dtype: Key of ``DTYPES``: how features are stored.
        views: Augmented views of every image.
        device: Where to compute.
    """

    compute: Callable[[Batch], Mapping[str, Tensor]]
    network: str
    dataset: ImageDataset
    loaders: Loaders
    batch_size: int
    prepare: Callable[[Batch], Batch]
    dtype: str
    views: int
    device: torch.device

    def cached(self, root: Path) -> FeatureCache:
        """Return the features, found or computed by rank 0, on every rank.

        Raises:
            FeatureCacheError: They cannot be computed, stored or read; other ranks are given the reason of rank 0.
        """
        trainer = self.loaders.trainer
        cache = self._find_or_compute(root) if trainer is None else self._from_rank_zero(root, trainer)
        cache.arrays  # noqa: B018 - mapped before workers are forked; a file that is missing is found at once
        return cache

    def _from_rank_zero(self, root: Path, trainer: pl.Trainer) -> FeatureCache:
        cache: FeatureCache | None = None
        failure: Exception | None = None
        if trainer.is_global_zero:
            try:
                cache = self._find_or_compute(root)
            except Exception as error:  # the other ranks hear of it first, or they would wait for ever
                failure = error
        cache, reason = trainer.strategy.broadcast((cache, failure and f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        if cache is None:
            raise FeatureCacheError(f"rank 0 could not cache the features: {reason}")
        return cache

    def _find_or_compute(self, root: Path) -> FeatureCache:
        dataset, length = self.dataset, self.views * len(self.dataset)
        rows = dataset.source.spaced(min(4, self.batch_size))
        sample = self._features(dataset.batch([(0, index) for index in rows.tolist()]))
        shapes = {name: [length, *value.shape[1:]] for name, value in sample.items()}
        data = fingerprint(dataset.source, dataset.further)
        components = self._circumstances() | {"data": data, "features": shapes}
        cache = open_entry(root, components)
        if cache is not None:
            check_sample(cache, rows, sample)
            log.info(f"features {cache.names} of the training images are taken from {cache.folder}")
            return cache
        keys = itertools.product(range(self.views), range(len(dataset)))
        loader = self.loaders.batches(dataset, keys, self.batch_size)
        total = math.ceil(length / self.batch_size)
        shown = track(loader, "Caching features", total, transient=True, disable=not sys.stdout.isatty())
        cache = write_entry(root, components, map(self._features, shown))
        log.info(f"features {cache.names} of the training images are cached in {cache.folder}: {cache.nbytes:,} bytes")
        return cache

    def _features(self, batch: Batch) -> dict[str, Tensor]:
        count, trainer = len(batch["images"]), self.loaders.trainer
        # Filled up to a whole batch, since kernels, and so the last bits, go by the batch's shape.
        whole = {name: _filled(part, self.batch_size - count) for name, part in batch.items()}
        ready = self.prepare(move_data_to_device(whole, self.device))
        plugin = None if trainer is None else trainer.precision_plugin
        with torch.no_grad(), contextlib.nullcontext() if plugin is None else plugin.forward_context():
            return {name: value[:count] for name, value in self.compute(ready).items()}

    def _circumstances(self) -> dict[str, Any]:
        """What features depend on besides the data."""
        dataset, trainer = self.dataset, self.loaders.trainer
        augment = "none" if dataset.augmentation is None else dataset.augmentation.name
        transform = {"input": dataclasses.asdict(dataset.spec), "augment": augment, "views": self.views}
        transform["pillow"] = PIL.__version__
        if augment != "none":
            transform |= {"seed": dataset.seed, "torchvision": torchvision.__version__}
        precision = "32-true" if trainer is None else str(trainer.precision)
        arithmetic = {"device": self.device.type, "precision": precision, "torch": str(torch.__version__)}
        stored = {"format": FORMAT, "network": self.network, "dtype": self.dtype}
        return stored | {"transform": transform, "arithmetic": arithmetic}


def _filled(part: Any, missing: int) -> Any:
    """A part of a batch with its first sample repeated at the end."""
    if isinstance(part, Tensor):
        return torch.cat([part, part[:1].expand(missing, *part.shape[1:])])
    return [*part, *[part[0]] * missing]


def check_dtype(dtype: str) -> None:
    """Raise a ValueError unless features can be stored as ``dtype``."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")


def check_views(views: int | None, augment: str) -> int:
    """Return how many views of every image are cached.

    Args:
        views: Views asked for, or ``None``.
        augment: Name of the augmentation.

    Raises:
        ValueError: The augmentation is random and ``views`` not given, or there is nothing to draw several views from.
    """
    if views is not None and not is_whole(views, 1):
        raise ValueError(f"views must be a positive integer or None, got {views!r}")
    if augment != "none" and views is None:
        raise ValueError(
            f"augment={augment!r} draws other images in every epoch, whose features cannot be cached; use "
            "augment='none', or give views=k to train on k fixed augmented views of every image"
        )
    if augment == "none" and views is not None and views > 1:
        raise ValueError(f"views={views} would all be the same with augment='none'; give an augmentation or no views")
    return views or 1


def fingerprint(source: ImageSource, further: Mapping[str, Values] | None = None) -> str:
    """Return a digest of a split: its labels, its pictures' keys and contents, and further parts of its samples.

    Files count as unchanged while size and time of modification (in ns) are, as for rsync and make: copied without
    their times they are taken for new ones, and computing again is all that costs. The pixels of an array are digested;
    a source of another kind is decoded picture by picture.

    Args:
        source: The pictures of a split.
        further: Further parts of its samples by name; what a function returns is digested sample by sample.
    """
    digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
    digest.update(json.dumps(source.keys()).encode())
    if isinstance(source, FileSource):
        stats = (os.stat(source.name(index)) for index in range(len(source)))  # noqa: PTH116 - names are strings
        digest.update(np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], dtype=np.int64).tobytes())
    elif isinstance(source, ArraySource):
        _update(digest, source.pixels)
    else:
        for index in range(len(source)):
            picture = source.picture(index)
            digest.update(picture.mode.encode())
            _update(digest, np.asarray(picture))
    for name, values in (further or {}).items():
        digest.update(name.encode())
        for part in map(values, np.arange(len(source))[:, None]) if callable(values) else [values]:
            for value in part if isinstance(part, list | tuple) else [part]:
                _update(digest, np.asarray(value))
    return digest.hexdigest()


def _update(digest: Any, pixels: np.ndarray) -> None:
    digest.update(str((pixels.dtype.str, pixels.shape)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
