"""The base of all data modules: loaders in exact order, resume, and stored features, under a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from .arguments import check_whole
from .caching.feature_cache import FeatureCache
from .caching.precompute import Precomputation, check_dtype, check_views
from .dataset import Batch
from .extras import Described
from .sampling import POISSON, SAMPLINGS, SHUFFLED, EpochSampler, Loaders, PoissonSampler
from .splits import SPLITS, ImageSplits

_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",), None: SPLITS}


class ImageDataModule(ImageSplits, pl.LightningDataModule):
    """Serves batches as mappings: normalised float32 ``images`` (B, C, H, W), int64 ``labels`` (B,), and other parts.

    The loader's own images are uint8; :meth:`on_after_batch_transfer` normalises them on the device. Evaluation sees
    exactly what calling :attr:`input` on a picture gives, so that a bundle's accuracy is the checkpoint's.

    The order of training images depends on (seed, epoch) and an image's augmentation on (seed, epoch, index), whatever
    the number of workers; a run resumed inside an epoch goes on with the first batch that training had not consumed.
    Across devices every rank serves its own share: in evaluation no image is served twice.

    A subclass gives what :class:`~cleave.datamodules.splits.ImageSplits` asks of it.

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
        skip_corrupt: Leave out pictures that cannot be decoded or preprocessed, and log how many, instead of an error.
        color_jitter: How far brightness, contrast and saturation of training images are changed at most, 0.4 for 40 %;
            or these and ``hue`` by name.
        random_erasing: Share of the training images in which a rectangle is blackened.
        transforms: Further transforms of uint8 training images (C, H, W), as of ``torchvision.transforms.v2``, or their
            descriptions with ``_target_``.
        mixup: Alpha of mixup, 0 for none. Mixed images have labels (B, classes), the share of each class.
        cutmix: Alpha of CutMix, 0 for none.
        sampling: ``shuffled``: every image once an epoch; ``poisson``: each image in each batch with the probability
            ``batch_size`` / images, as differentially private training draws them.
        part: One of several even, random parts of the training images, such as ``1/2``; ``None`` takes all.
        part_seed: Seed of that division.

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
        color_jitter: float | Mapping[str, float] | None = None,
        random_erasing: float = 0.0,
        transforms: Sequence[Described] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        sampling: str = SHUFFLED,
        part: str | None = None,
        part_seed: int = 0,
    ) -> None:
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
        self.sampling = sampling
        super().__init__(
            seed=seed,
            augment=augment,
            image_size=image_size,
            mean=mean,
            std=std,
            interpolation=interpolation,
            cache=cache,
            skip_corrupt=skip_corrupt,
            color_jitter=color_jitter,
            random_erasing=random_erasing,
            transforms=transforms,
            mixup=mixup,
            cutmix=cutmix,
            part=part,
            part_seed=part_seed,
        )
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        check_whole("batch_size", batch_size, 1)
        check_whole("eval_batch_size", self.eval_batch_size, 1)
        check_whole("num_workers", num_workers, 0)
        # Not to the logger: Lightning refuses to log a name (`seed`) that data and network module give two values.
        self.save_hyperparameters(logger=False, ignore=["transforms"])  # those may be objects

    # --- features of frozen parts -----------------------------------------------------------------------------------

    def cache_features(
        self,
        compute: Callable[[Batch], Mapping[str, Tensor]],
        network: str,
        *,
        directory: str | Path,
        dtype: str = "float32",
        views: int | None = None,
        images: bool = True,
        device: torch.device | str = "cpu",
    ) -> FeatureCache:
        """Compute what frozen parts make of the training images once, or find it, and serve it with them from now on.

        Training batches get a further part ``given``: features (B, ...) by name, in the trainer's precision; all other
        batches stay as they are. It lasts until the fit ends, :meth:`drop_features` or another input is configured,
        and reaches loaders that were made before but not iterated. Across devices every rank must call it: rank 0
        computes.

        Where kernels depend on the shape of a batch alone, float32 features equal those computed in training bit by
        bit, as they are computed in whole batches of ``batch_size`` too; otherwise they differ by rounding, about 1e-6.

        Args:
            compute: Maps a batch as a training step gets it, on ``device``, to features (B, ...) by any names. What it
                runs must be in eval mode; it runs without gradients, in the trainer's precision.
            network: Digest of all that ``compute`` depends on: its weights, buffers and cuts.
            directory: Folder of the cache, which many runs may share. An entry may be deleted when no run uses it.
            dtype: ``float32``, or ``float16`` for half the bytes and relative errors of up to 5e-4.
            views: Where the augmentation is random: fixed augmented views per image. Epoch e serves view e modulo
                ``views``: the images that epoch e modulo ``views`` has without a cache, in the order of epoch e.
            images: ``False`` leaves the images out of the batches and decodes none of them.
            device: Where to compute.

        Returns:
            The entry in use.

        Raises:
            FeatureCacheError: ``directory`` is in use for something else, an entry is damaged or belongs to another
                run, the disk is full, or a value lies beyond the range of ``dtype``.
            ValueError: The augmentation is random and ``views`` not given, or an argument is out of range.
        """
        if self.mixup or self.cutmix:
            raise ValueError(
                f"feature_cache.use=true stores features of single images, but mixup={self.mixup} and "
                f"cutmix={self.cutmix} mix them anew in every epoch; set both to 0, or leave the cache out"
            )
        views = check_views(views, self.augmentation_name)
        check_dtype(dtype)
        self.drop_features()
        dataset = self.dataset("train")
        cache = Precomputation(
            compute=compute,
            network=network,
            dataset=dataset,
            loaders=self._loaders,
            batch_size=self.batch_size,
            prepare=self._normalized,
            dtype=dtype,
            views=views,
            device=torch.device(device),
        ).cached(Path(directory).absolute())
        dataset.features, dataset.with_images = cache, images
        return cache

    def drop_features(self) -> None:
        """Serve training images without cached features again."""
        if "train" in self._datasets:
            self._datasets["train"].features = None

    # --- what Lightning calls ---------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Look at the pictures of a stage, before a fit those of the test too; then decode and cache its splits.

        Across devices the first rank looks, and the others find what it wrote down.
        """
        trainer = self.trainer if self.trainer is not None and self.trainer.world_size > 1 else None
        if trainer is not None and not trainer.is_global_zero:
            trainer.strategy.barrier("pictures")
        try:
            for split in SPLITS if stage == "fit" else _STAGE_SPLITS[stage]:
                self.look(split, decoded=split in _STAGE_SPLITS[stage])
        finally:
            if trainer is not None and trainer.is_global_zero:
                trainer.strategy.barrier("pictures")
        for split in _STAGE_SPLITS[stage]:
            self.dataset(split)

    def teardown(self, stage: str | None = None) -> None:
        """Drop cached features at the end of a fit: another task's frozen parts are others."""
        if stage == "fit":
            self.drop_features()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise a batch on its device, in the trainer's precision, to which cached features are brought as well.

        The uint8 images stay beside the normalised ones, as ``pixels``.
        """
        batch = self._normalized(batch)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.is_floating_point():  # shares of classes: double where the rest is
            batch["labels"] = labels.to(torch.promote_types(labels.dtype, self._in_precision(labels).dtype))
        if "given" in batch:
            batch["given"] = {name: self._in_precision(value.float()) for name, value in batch["given"].items()}
        return batch

    def train_dataloader(self) -> DataLoader:
        """Return the loader of augmented training batches.

        Raises:
            ValueError: ``drop_last`` leaves no batch.
        """
        poisson = self.sampling == POISSON
        return self._loaders.training(self.dataset("train"), self.batch_size, self.drop_last, poisson)

    def training_indices(self, batch: int) -> list[int] | None:
        """Return which images of the split this rank's training batch of some number holds, in the present epoch.

        ``None`` where another sampler than this module's is in use.
        """
        loader = None if self.trainer is None else self.trainer.train_dataloader
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, EpochSampler | SequentialSampler):
            return None
        if isinstance(sampler, PoissonSampler):
            return sampler.batch(batch)
        order = sampler.order() if isinstance(sampler, EpochSampler) else list(sampler)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

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
            split: ``train``, ``val``, ``test``, or ``rest``.
            persistent: Keep the workers between epochs.
        """
        dataset = self.dataset(split).without_augmentation()
        return self._loaders.evaluation(dataset, self.eval_batch_size, persistent)

    @property
    def _loaders(self) -> Loaders:
        return Loaders(self.num_workers, self.pin_memory, self.seed, self.trainer)

    def _normalized(self, batch: Batch) -> Batch:
        if "images" not in batch:
            return dict(batch)
        pixels = batch["images"]
        return {**batch, "images": self._in_precision(self.input.normalize(pixels)), "pixels": pixels}

    def _in_precision(self, values: Tensor) -> Tensor:
        return values if self.trainer is None else self.trainer.precision_plugin.convert_input(values)
