"""The images that a bundle is run on: digits, pictures in folders, frames of a video or a camera."""

from __future__ import annotations

import collections
import itertools
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from cleave.datamodules import Digits
from cleave.datamodules.sets.image_folder import EXTENSIONS
from cleave.deployment import ImageInput, Pipeline
from cleave.deployment.runtime.frames import LAST_CAMERA, VIDEO_ENDINGS, check_opencv, frames
from cleave.scripts.assembly.given.texts import spelled

if TYPE_CHECKING:
    from cleave.deployment import Device


class Item(NamedTuple):
    """An image as a bundle takes it, uint8 (C, H, W), with what is known of it."""

    image: Tensor
    name: str
    label: str | None = None
    file_bytes: int | None = None


class Batch(NamedTuple):
    """Images as a bundle takes them, uint8 (B, C, H, W), with what is known of each."""

    images: Tensor
    names: list[str]
    labels: list[str | None]
    file_bytes: list[int | None]


class Reading:
    """Hands on the images of batches, one batch after the other, and keeps what belongs to them until it is answered.

    What stops the reading is kept back as well, so that all batches before it can be answered first.

    Args:
        source: The batches.

    Attributes:
        waiting: The batches that were handed on, the oldest first; who has an answer takes one away.
    """

    def __init__(self, source: Iterable[Batch]) -> None:
        self.waiting: collections.deque[Batch] = collections.deque()
        self._source = source
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Tensor]:
        try:
            for batch in self._source:
                self.waiting.append(batch)
                yield batch.images
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise what has stopped the reading, if anything has."""
        if self._error is not None:
            raise self._error


def check_input(given: Any) -> None:
    """Raise unless ``input`` may name images: before a bundle is loaded for them.

    Raises:
        ValueError: It is neither text nor the index of a camera.
        FileNotFoundError: It is neither ``digits``, nor a file, nor a folder with images.
        ImportError: It has frames, and what reads them is not installed.
    """
    index = isinstance(given, int) and not isinstance(given, bool)
    if not (isinstance(given, str) and given) and not (index and 0 <= given <= LAST_CAMERA):
        raise ValueError(
            f"input must be an image, a folder of images, a video, `digits`, or the index of a camera, 0 to "
            f"{LAST_CAMERA}, got {spelled(given)}"
        )
    if (source := moving(given)) is not None:
        check_opencv()
        if isinstance(source, str) and not Path(source).is_file() and "://" not in source:
            raise FileNotFoundError(f"input={source} is no file; name a video, or the index of a camera")
    elif given != "digits":
        image_files(Path(given))


def batches(cfg: DictConfig, pipeline: Pipeline | Device) -> Generator[Batch, None, None]:
    """Read the images batch by batch; those before one that cannot be read come first, in a batch of their own.

    Raises:
        FileNotFoundError: ``input`` is neither ``digits``, nor a file, nor a folder with images.
        ImageError: A picture, or a video, cannot be read.
    """
    found = iter(_items(cfg, pipeline))
    stopped: Exception | None = None
    while stopped is None:
        some: list[Item] = []
        try:
            for item in itertools.islice(found, cfg.batch_size):
                some.append(item)
        except Exception as error:
            stopped = error
        if some:
            images, names, labels, file_bytes = (list(each) for each in zip(*some, strict=True))
            yield Batch(torch.stack(images), names, labels, file_bytes)
        if stopped is None and len(some) < cfg.batch_size:
            return
    raise stopped


def _items(cfg: DictConfig, pipeline: Pipeline | Device) -> Iterator[Item]:
    """Read the images one by one; the class of a file is the folder nearest to it that has a class's name."""
    if (source := moving(cfg.input)) is not None:
        spec = image_input(pipeline)
        for number, picture in enumerate(frames(source, cfg.limit)):
            yield Item(spec(picture), f"frame {number}")
        return
    if cfg.input == "digits":
        data = Digits()
        data.configure_input(image_input(pipeline))
        batch = data.sample_batch("test", cfg.limit or 10**6)
        for i, (image, label) in enumerate(zip(batch["images"], batch["labels"].tolist(), strict=True)):
            yield Item(image, f"digit {i}", data.class_names[label])
        return
    folder = Path(cfg.input)
    for file in image_files(folder)[: cfg.limit]:
        name = str(file.relative_to(folder)) if folder.is_dir() else file.name
        label = class_of(file, folder, pipeline.bundle.class_names)
        yield Item(pipeline.preprocess(file), name, label, file.stat().st_size)


def moving(given: Any) -> str | int | None:
    """Return a video file or the index of a camera where ``input`` is one."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    return str(given) if Path(str(given)).suffix.lower() in VIDEO_ENDINGS else None


def still(given: Any) -> bool:
    """Return whether ``input`` is a picture, or a folder of them."""
    return given != "digits" and moving(given) is None


def class_of(file: Path, root: Path, class_names: Sequence[str]) -> str | None:
    """Return the class that the folders of an image name, the nearest first and the root's own last; ``None``: none."""
    depth = len(file.relative_to(root).parts) if root.is_dir() else 1
    folders = [folder.name for folder in file.absolute().parents[:depth]]
    known = {unicodedata.normalize("NFC", name): name for name in class_names}
    found = (known.get(unicodedata.normalize("NFC", name)) for name in folders)
    return next((name for name in found if name is not None), None)


def image_input(pipeline: Pipeline | Device) -> ImageInput:
    """Return how images become the bundle's input; ValueError where it takes none."""
    found = pipeline.bundle.input
    if not isinstance(found, ImageInput):
        raise ValueError(
            f"this bundle takes {found.name}, {found.dtype} {list(found.shape)}, so infer.py cannot read it"
        )
    return found


def image_files(path: Path) -> list[Path]:
    """An image itself, or all images below a folder in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"input={path} is neither an image, nor a folder of images, nor `digits`")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"no image in {path}; files that count end in {', '.join(sorted(EXTENSIONS))}")
    return files
