"""Splits of pictures, preprocessed for one input: what a data module serves, without loaders and trainer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from cleave.deployment import ImageInput

from .arguments import changed_input, check_cache, check_whole, input_changes
from .augment import Augmentation, check_preset
from .dataset import Batch, ImageDataset, Values
from .extras import Described, further_transforms
from .look import corrupt_pictures
from .mixing import Mixing, check_alphas
from .parts import REST, check_part, part_of
from .sources import CorruptImageError, FileSource, ImageSource

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


class ImageSplits(ABC):
    """The splits ``train``, ``val`` and ``test`` of a data set, and the input that their pictures are made into.

    A subclass gives :attr:`native_input` and :meth:`load_splits`, and :attr:`class_names` where there are classes. For
    more than images and labels it extends :attr:`parts` and gives :meth:`further_parts`:

        class Scenes(ImageFolder):
            parts = ("images", "labels", "mask")
            maps = ("mask",)

            def further_parts(self, split, source):
                return {"mask": np.load(f"{self.root}/{split}-masks.npy", mmap_mode="r")}

    Args:
        seed: Seed of the augmentation.
        augment: A preset of :data:`~cleave.datamodules.augment.PRESETS` for training images.
        image_size: Side of the input in pixels, or (height, width), instead of the backbone's.
        mean: Per-channel mean instead of the backbone's.
        std: Per-channel standard deviation instead of the backbone's.
        interpolation: Resize filter instead of the backbone's.
        cache: Whether decoded pictures are kept in memory, or ``"auto"``.
        skip_corrupt: Leave out pictures that cannot be decoded.
        color_jitter: As of :func:`~cleave.datamodules.extras.further_transforms`.
        random_erasing: As there.
        transforms: As there.
        mixup: As of :class:`~cleave.datamodules.mixing.Mixing`.
        cutmix: As there.
        part: One of several even, random parts of the training images, such as ``1/2``; ``None`` takes all. What it
            leaves out is the split ``rest``.
        part_seed: Seed of that division.

    Attributes:
        parts: Names of the parts of a batch: ``images``, maybe ``labels``, and what :meth:`further_parts` gives.
        maps: Those further parts that lie on the image's grid, (..., H, W) at the input's size, as a label for every
            pixel does: crops and flips move them along, zeros moving in.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    parts: ClassVar[tuple[str, ...]] = ("images", "labels")
    maps: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        seed: int,
        augment: str,
        image_size: int | Sequence[int] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        interpolation: str | None,
        cache: bool | str,
        skip_corrupt: bool,
        color_jitter: float | Mapping[str, float] | None = None,
        random_erasing: float = 0.0,
        transforms: Sequence[Described] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        part: str | None = None,
        part_seed: int = 0,
    ) -> None:
        super().__init__()
        check_part(part, part_seed)
        check_preset(augment)
        check_whole("seed", seed, 0)
        check_cache(cache)
        check_alphas(mixup, cutmix)
        self.seed = seed
        self.augment = augment
        self.mixup, self.cutmix = mixup, cutmix
        self.part, self.part_seed = part, part_seed
        self.further, self._further_words = further_transforms(color_jitter, random_erasing, transforms)
        self.cache = cache
        self.skip_corrupt = skip_corrupt
        self.overrides = input_changes(image_size, mean, std, interpolation)
        self._configured: ImageInput | None = None
        self._found: dict[str, ImageSource] | None = None
        self._splits: dict[str, ImageSource] = {}
        self._datasets: dict[str, ImageDataset] = {}
        self._told: set[str] = set()

    # --- what a subclass gives --------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the labels; none where the data have no classes."""
        return []

    @property
    @abstractmethod
    def native_input(self) -> ImageInput:
        """The input that suits these pictures when no backbone asks for another."""

    @abstractmethod
    def load_splits(self) -> dict[str, ImageSource]:
        """Find the pictures of ``train``, ``val`` and ``test``; called once."""

    def further_parts(self, split: str, source: ImageSource) -> dict[str, Values]:
        """Find what samples have besides images and labels, when a split is first used.

        Args:
            split: ``train``, ``val`` or ``test``.
            source: Its pictures, without those that ``skip_corrupt`` left out; the parts are in their order.

        Returns:
            By name an array or tensor (N, ...), of which batches get rows (B, ...); or a function that maps int64
            indices (B,) to the part of a batch, such as a list of boxes, different in number for every image.
        """
        return {}

    # --- the input --------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input(self) -> ImageInput:
        """The input in use: the configured or the native one, with the overrides given to the constructor."""
        return changed_input(self._configured or self.native_input, self.overrides)

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

    @property
    def augmentation_name(self) -> str:
        """What is done to training images, as a text that tells it from all else; ``none`` for nothing."""
        return f"{self.augment}{self._further_words}"

    # --- the pictures -----------------------------------------------------------------------------------------------

    def split(self, name: str) -> ImageSource:
        """Return the pictures of ``train``, ``val`` or ``test``, or the ``rest`` that a part of ``train`` leaves out.

        Raises:
            ValueError: The data are missing or laid out otherwise than the class describes, or the split is unknown.
        """
        if name == REST and self.part is None:
            raise ValueError("without part, such as part='1/2', training takes every image and leaves no rest")
        if name not in (*SPLITS, REST):
            raise ValueError(f"unknown split {name!r}; known are {list(SPLITS)}")
        if self._found is None:
            self._found = self.load_splits()
        if name not in self._splits:
            whole = "train" if name == REST else name
            if whole not in self._found:
                raise ValueError(f"there are no {whole} images: {', '.join(sorted(self._found))} alone were found")
            source = self._found[whole]
            if whole == "train" and self.part is not None:
                source = part_of(source, self.part, self.part_seed, rest=name == REST)
            if self.skip_corrupt:
                bad = corrupt_pictures(source, source.picture, "decoded", f"looking at {name}")
                source = self._without(name, source, bad)
            self._splits[name] = source
        return self._splits[name]

    def image_file_bytes(self, split: str = "test") -> float:
        """Return the mean size of the original image files of a split in bytes (as PNG where there are no files)."""
        source = self.split(split)
        return float(np.mean([source.file_bytes(index) for index in range(len(source))]))

    def raw_image_bytes(self, split: str = "test") -> float:
        """Return the mean of rows x columns x channels of a split's original pictures: their uint8 bytes."""
        source = self.split(split)
        return float(np.mean([np.prod(source.shape(index)) for index in range(len(source))]))

    def sample_batch(self, split: str, count: int) -> Batch:
        """Return ``count`` samples at even distances through a split, as evaluation gets them.

        Returns:
            A batch as a loader yields it, with uint8 images (count, C, H, W); fewer if the split has fewer.
        """
        dataset = self.dataset(split).without_augmentation()
        return dataset.batch(dataset.source.spaced(count).tolist())

    def dataset(self, split: str) -> ImageDataset:
        """Return the dataset of a split, decoding and caching it at the first call.

        Raises:
            CorruptImageError: A picture cannot be decoded; the message names it.
            ValueError: :attr:`parts` and :meth:`further_parts` do not fit, or the augmentation cannot move the maps.
        """
        if split not in self._datasets:
            source = self.look(split)
            self._datasets[split] = self._dataset(split, source, self.cache, self._further(split, source))
        return self._datasets[split]

    def look(self, split: str, *, decoded: bool = True) -> ImageSource:
        """Return the pictures of a split after each was read once as a loader would.

        Args:
            split: ``train``, ``val`` or ``test``.
            decoded: Whether :meth:`dataset` follows, which reads all pictures of a split that it keeps decoded.

        Raises:
            CorruptImageError: Pictures cannot be used, and ``skip_corrupt`` is off.
        """
        source = self.split(split)
        if not isinstance(source, FileSource):
            return source
        self._tell_turned(split, source)
        plain = self._dataset(split, source, False, {})
        if decoded and not self.skip_corrupt and plain.keeps_decoded(self.cache):
            return source
        if bad := plain.corrupt(f"looking at {split}"):
            if not self.skip_corrupt:
                raise CorruptImageError(_listed(split, list(bad.values())))
            self._splits[split] = self._without(split, source, bad)
        return self._splits[split]

    def _tell_turned(self, split: str, source: FileSource) -> None:
        """Say once for a split that EXIF orientations are not applied, where there are any."""
        if split in self._told:
            return
        self._told.add(split)
        turned, looked_at = source.turned()
        if turned:
            log_once(
                f"{split}: {turned} of {looked_at} images looked at are to be turned by their EXIF orientation, which "
                "is applied neither in training nor on the device; PIL.ImageOps.exif_transpose turns files beforehand"
            )

    def _dataset(self, split: str, source: ImageSource, cache: bool | str, further: dict[str, Values]) -> ImageDataset:
        training = split == "train"
        augmentation = None
        if training and self.augmentation_name != "none":
            augmentation = Augmentation(self.augment, self.input, self.further, self._further_words)
        return ImageDataset(
            source,
            self.input,
            augmentation=augmentation,
            mixing=self._mixing() if training else None,
            seed=self.seed,
            cache=cache,
            labels="labels" in self.parts,
            further=further,
            maps=self.maps if further else (),
        )

    def _mixing(self) -> Mixing | None:
        if not self.mixup and not self.cutmix:
            return None
        if tuple(self.parts) != ("images", "labels"):
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} mix images and labels alone, and these batches have the "
                f"parts {self.parts}; set both to 0"
            )
        return Mixing(self.mixup, self.cutmix, self.num_classes)

    def _further(self, split: str, source: ImageSource) -> dict[str, Values]:
        found = self.further_parts(split, source)
        wanted = [name for name in self.parts if name not in ("images", "labels")]
        if "images" not in self.parts or sorted(found) != sorted(wanted):
            raise ValueError(
                f"parts={self.parts} must be 'images', 'labels' if there are any, and what further_parts gives for "
                f"{split}, which is {sorted(found)}"
            )
        if foreign := sorted(set(self.maps) - set(wanted)):
            raise ValueError(f"maps={self.maps} must be some of the further parts {wanted}, not {foreign}")
        return {name: found[name] for name in wanted}

    def _without(self, split: str, source: ImageSource, bad: Mapping[int, CorruptImageError]) -> ImageSource:
        """Leave out pictures that cannot be used, as long as each class keeps some."""
        if not bad:
            return source
        first = source.name(min(bad))
        source = source.subset(np.delete(np.arange(len(source)), list(bad)))
        left = set(source.labels.tolist())
        if empty := [name for label, name in enumerate(self.class_names) if label not in left]:
            raise CorruptImageError(f"no image of {empty} in {split} can be decoded; the first one is {first}")
        if not left:
            raise CorruptImageError(f"no image of {split} can be decoded; the first one is {first}")
        log_once(f"{split}: left out {len(bad)} corrupt image(s), the first is {first}")
        return source


def _listed(split: str, errors: Sequence[CorruptImageError]) -> str:
    if len(errors) == 1:
        return str(errors[0])
    shown = "; ".join(str(error) for error in errors[:5])
    more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
    return f"{len(errors)} images of {split} cannot be used: {shown}{more}. data.skip_corrupt=true leaves them out"


@rank_zero_only
def log_once(message: str) -> None:
    """Log one line on rank zero about how the data are used."""
    log.info(message)
