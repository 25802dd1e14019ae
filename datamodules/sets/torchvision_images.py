"""Any image data set of torchvision, or of its kind, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..arguments import imported, picked_classes
from ..sources import ArraySource, CorruptImageError, ImageSource
from .completing import WHOLE, FoundImages

# What data sets call their splits, in the order of preference.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class TorchvisionImages(FoundImages):
    """The pictures and labels of a map-style data set whose items are (picture, class index).

    A data set with an argument ``split`` gives what it has of ``train``, ``val`` and ``test``, one with an argument
    ``train`` gives ``train`` and ``test``, and any other is divided. What is still missing is split off as
    :class:`~cleave.datamodules.sets.completing.FoundImages` says.

    Args:
        dataset: ``_target_``, the dotted path of the class, and its arguments, such as ``root`` and ``download``.
        classes: The classes to take, of those that there are; ``None``: all.
        val_from: ``"test"`` makes one half of the test images the validation split.
        val_fraction: Share of every class that is split off where a split is missing.
        augment: A preset as in :class:`ImageDataModule`.
        **options: As in :class:`ImageDataModule`.

    Raises:
        ValueError: From the first use of the data on, and before any training: the class cannot be imported or built,
            or its items are no pictures with class indices.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any],
        *,
        classes: Sequence[str] | None = None,
        val_from: str = "train",
        val_fraction: float = 0.1,
        augment: str = "imagenet",
        **options: Any,
    ) -> None:
        if not isinstance(dataset, Mapping) or not dataset.get("_target_"):
            raise ValueError(
                f"dataset names a class by _target_, such as torchvision.datasets.Flowers102; got {dataset!r}"
            )
        dataset = dict(dataset)
        super().__init__(classes=classes, val_from=val_from, val_fraction=val_fraction, augment=augment, **options)
        self.described = dataset

    def find(self) -> tuple[list[str], dict[str, ImageSource], str]:
        """Build the data set of every split that it has."""
        path = str(self.described["_target_"])
        arguments = {name: value for name, value in self.described.items() if name != "_target_"}
        built = _splits(_imported(path), arguments, path)
        return (*dataset_sources(built, self.classes, path), path)


def dataset_sources(
    built: Mapping[str, Any], classes: Sequence[str] | None, path: str
) -> tuple[list[str], dict[str, ImageSource]]:
    """Return the names of the classes that are asked for, and the pictures of each split of a data set.

    Args:
        built: The data sets by split; they may have ``classes``, the names of all classes.
        classes: The classes to take; ``None``: all.
        path: What messages call the data set.
    """
    sources: dict[str, ImageSource] = {split: DatasetSource(each, f"{path} {split}") for split, each in built.items()}
    count = 1 + max(int(source.labels.max()) for source in sources.values())
    given = getattr(next(iter(built.values())), "classes", None) or ()
    known = [str(name) for name in given] if len(given) >= count else [str(label) for label in range(count)]
    names = picked_classes(known, classes, path)
    if names != known:
        kept = np.array([names.index(name) if name in names else -1 for name in known])
        for split, source in sources.items():
            labels = kept[source.labels]
            sources[split] = source.subset(np.flatnonzero(labels >= 0))
            sources[split].labels = labels[labels >= 0]
    return names, sources


class DatasetSource(ImageSource):
    """The pictures of a map-style data set.

    Args:
        dataset: Its items are (picture, class index); a picture is Pillow's, or uint8 (H, W), (H, W, 3) or (C, H, W).
        title: What the split is called in messages.
        indices: The items to take; ``None``: all.
    """

    def __init__(self, dataset: Any, title: str, indices: np.ndarray | None = None) -> None:
        self.dataset, self.title = dataset, title
        self.indices = np.arange(len(dataset)) if indices is None else indices
        super().__init__(_labels(dataset, title)[self.indices])

    def name(self, index: int) -> str:
        """Return the split's title and the item's number."""
        return f"{self.title} image {self.indices[index]}"

    def keys(self) -> list[str]:
        """Return the items' numbers."""
        return [str(index) for index in self.indices.tolist()]

    def picture(self, index: int) -> Image.Image:
        """Return the item's picture.

        Raises:
            CorruptImageError: The data set cannot give it, or it is no picture.
        """
        try:
            value = self.dataset[int(self.indices[index])][0]
        except Exception as error:  # a stranger's data set may raise anything
            raise CorruptImageError(f"cannot read {self.name(index)}: {error}") from error
        if isinstance(value, Image.Image):
            return value
        array = np.asarray(value)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise CorruptImageError(
                f"{self.name(index)} is no picture but {type(value).__name__} of {array.dtype} {array.shape}; leave "
                "transforms out, as Cleave has its own"
            )
        return Image.fromarray(np.ascontiguousarray(array))

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return the picture's own shape."""
        picture = self.picture(index)
        return picture.height, picture.width, 1 if picture.mode in ("1", "L", "LA") else 3

    def file_bytes(self, index: int) -> int:
        """Return the bytes of the picture as a PNG file."""
        array = np.asarray(self.picture(index).convert("L" if self.shape(index)[2] == 1 else "RGB"))
        return ArraySource(array[None], None, self.title).file_bytes(0)

    def subset(self, indices: np.ndarray) -> DatasetSource:
        """Return the pictures at ``indices`` alone, in that order."""
        part = DatasetSource.__new__(DatasetSource)
        ImageSource.__init__(part, self.labels[indices])
        part.dataset, part.title, part.indices = self.dataset, self.title, self.indices[indices]
        return part


def _imported(path: str) -> Callable[..., Any]:
    try:
        return imported(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"dataset._target_={path!r} cannot be imported: {error}") from error


def _splits(build: Callable[..., Any], arguments: dict[str, Any], path: str) -> dict[str, Any]:
    """Build the data set of every split that it has; under ``WHOLE`` where it has none."""
    known = inspect.signature(build).parameters
    if "split" in known and "split" not in arguments:
        found = {}
        for split, names in SPLIT_NAMES.items():
            for name in names:
                try:
                    found[split] = build(**arguments, split=name)
                    break
                except ValueError:  # torchvision's word for a split that it does not know
                    continue
        if "train" in found:
            return found
    try:
        if "train" in known and "train" not in arguments:
            return {"train": build(**arguments, train=True), "test": build(**arguments, train=False)}
        return {WHOLE: build(**arguments)}
    except Exception as error:
        raise ValueError(f"the data set {path} cannot be built with {arguments}: {error}") from error


def _labels(dataset: Any, title: str) -> np.ndarray:
    for name in ("targets", "labels", "_labels"):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset):
            break
    else:
        values = [dataset[index][1] for index in range(len(dataset))]
    try:
        labels = np.asarray([int(value) for value in values], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the labels of {title} are no class indices, such as {values[0]!r}: {error}") from error
    if not len(labels) or labels.min() < 0:
        raise ValueError(f"{title} has no images, or a negative label")
    return labels
