"""Sources of pictures: arrays in memory or files, with labels and original sizes, and fixed splits of them."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cleave.deployment import ImageError, open_image

GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112
RANGELESS_MODES = ("I", "F")
"""Pillow modes of 32-bit grey, which no input can be made of: the range of their values is not known."""


class CorruptImageError(ValueError):
    """A picture cannot be decoded; the message names its file."""


class ImageSource(ABC):
    """The pictures and labels of one split.

    Args:
        labels: Class index of every picture; all 0 where there are no classes.
    """

    def __init__(self, labels: Sequence[int] | np.ndarray) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a person would call picture ``index``: its path or its number."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Return a name of every picture that does not hang on where the data lies."""

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """Decode picture ``index``.

        Raises:
            CorruptImageError: It cannot be decoded.
        """

    @abstractmethod
    def shape(self, index: int) -> tuple[int, int, int]:
        """Return (rows, columns, channels) of the original, of which grey has 1 and any colour 3 channels.

        Raises:
            CorruptImageError: Its header cannot be read.
        """

    @abstractmethod
    def file_bytes(self, index: int) -> int:
        """Return the size of the picture's file in bytes."""

    @abstractmethod
    def subset(self, indices: np.ndarray) -> ImageSource:
        """Return the pictures at ``indices`` alone, in that order."""

    def spaced(self, count: int) -> np.ndarray:
        """Return at most ``count`` indices at even distances, so that few classes are left out."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64))


class ArraySource(ImageSource):
    """Pictures held in one array.

    Args:
        pixels: uint8 array (N, H, W) of grey or (N, H, W, 3) of RGB pictures.
        labels: Class index of every picture, or ``None`` where there are no classes.
        title: What the split is called in messages.
    """

    def __init__(self, pixels: np.ndarray, labels: Sequence[int] | np.ndarray | None, title: str) -> None:
        super().__init__(np.zeros(len(pixels)) if labels is None else labels)
        self.pixels = pixels
        self.title = title

    def name(self, index: int) -> str:
        """Return the split's title and the picture's number."""
        return f"{self.title} image {index}"

    def keys(self) -> list[str]:
        """Return the pictures' numbers."""
        return [str(index) for index in range(len(self))]

    def picture(self, index: int) -> Image.Image:
        """Wrap the array's pixels."""
        return Image.fromarray(self.pixels[index])

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return the array's own shape."""
        rows, columns = self.pixels.shape[1:3]
        return rows, columns, 1 if self.pixels.ndim == 3 else 3

    def file_bytes(self, index: int) -> int:
        """Return the bytes of the picture as a PNG file: an array has no file of its own."""
        buffer = io.BytesIO()
        self.picture(index).save(buffer, format="PNG")
        return buffer.tell()

    def subset(self, indices: np.ndarray) -> ArraySource:
        """Return the pictures at ``indices`` alone, in that order."""
        return ArraySource(self.pixels[indices], self.labels[indices], self.title)


class FileSource(ImageSource):
    """Pictures in files.

    Args:
        root: Folder that the paths start from.
        paths: One file per picture, relative to ``root``.
        labels: Class index of every picture, or ``None`` where there are no classes.
    """

    def __init__(
        self, root: str | Path, paths: Sequence[str] | np.ndarray, labels: Sequence[int] | np.ndarray | None = None
    ) -> None:
        super().__init__(np.zeros(len(paths)) if labels is None else labels)
        self.root = str(root)
        # One array of characters instead of a million Python strings: workers forked from this process share it.
        self.paths = np.array(paths, dtype=np.str_)

    def name(self, index: int) -> str:
        """Return the file's path."""
        return str(Path(self.root, str(self.paths[index])))

    def keys(self) -> list[str]:
        """Return the files' paths below the root, with forward slashes."""
        return [Path(path).as_posix() for path in self.paths.tolist()]

    def picture(self, index: int) -> Image.Image:
        """Decode the file.

        Raises:
            CorruptImageError: It cannot be decoded, or is 32-bit grey.
        """
        path = self.name(index)
        try:
            image = open_image(path)  # the device's reader, and its limit of pixels
        except ImageError as error:
            if isinstance(error.__cause__, FileNotFoundError | PermissionError):
                raise error.__cause__ from None
            raise CorruptImageError(f"cannot decode the image {path}: {error.__cause__ or error}") from error
        self._check_mode(image, path)
        return image

    def shape(self, index: int) -> tuple[int, int, int]:
        """Read the file's header.

        Raises:
            CorruptImageError: It cannot be read, or the picture is 32-bit grey.
        """
        path = self.name(index)
        try:
            with Image.open(path) as image:
                columns, rows = image.size
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            raise CorruptImageError(f"cannot decode the image {path}: {error}") from error
        self._check_mode(image, path)
        return rows, columns, 1 if image.mode in GREY_MODES else 3

    def turned(self) -> tuple[int, int]:
        """Return how many of up to 256 files say by EXIF that they are to be turned, and how many were looked at.

        No reader here turns them, nor does the device's.
        """
        looked_at = self.spaced(256).tolist()
        return sum(_orientation(self.name(index)) != 1 for index in looked_at), len(looked_at)

    def _check_mode(self, image: Image.Image, path: str) -> None:
        if image.mode in RANGELESS_MODES:
            raise CorruptImageError(
                f"the image {path} is 32-bit grey (Pillow mode {image.mode!r}) with no known range; store 8 or 16 bits"
            )

    def file_bytes(self, index: int) -> int:
        """Return the file's size on disk."""
        return Path(self.name(index)).stat().st_size

    def subset(self, indices: np.ndarray) -> FileSource:
        """Return the pictures at ``indices`` alone, in that order."""
        return FileSource(self.root, self.paths[indices], self.labels[indices])


def _orientation(path: str) -> int:
    """Return the EXIF orientation of a file, 1 for upright, also where its header cannot be read."""
    try:
        with Image.open(path) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a look at all pictures names it
        return 1


def split_off(source: ImageSource, fraction: float, class_names: Sequence[str]) -> tuple[ImageSource, ImageSource]:
    """Split off a share of every class, the same one on every machine and in every version of every library.

    Within a class the pictures are ranked by the SHA-256 of their keys and the first ``fraction`` of them is split off:
    the split hangs on no random generator, no listing order and no seed, and adding pictures moves few others.

    Args:
        source: The pictures to divide.
        fraction: Share of every class that is split off, above 0 and below 1; at least one picture is taken and left.
        class_names: Names of the classes, for messages; where there are none, all pictures are one class.

    Returns:
        What stays and what is split off, both in the source's order.

    Raises:
        ValueError: ``fraction`` is out of range or a class has fewer than two pictures.
    """
    check_fraction(fraction)
    digests = np.array([hashlib.sha256(key.encode()).hexdigest() for key in source.keys()])  # noqa: SIM118
    taken = np.zeros(len(source), dtype=bool)
    for label, class_name in enumerate(class_names or ["images"]):
        members = np.flatnonzero(source.labels == label)
        if len(members) < 2:
            raise ValueError(
                f"the class {class_name!r} has {len(members)} image(s), too few to split some off; add images, or "
                "bring the missing split yourself"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken[members[np.argsort(digests[members], kind="stable")[:count]]] = True
    return source.subset(np.flatnonzero(~taken)), source.subset(np.flatnonzero(taken))


def check_fraction(fraction: float) -> None:
    """Raise a ValueError unless ``fraction`` lies between 0 and 1."""
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {fraction}")


def check_val_from(val_from: str) -> None:
    """Raise a ValueError unless ``val_from`` names a split that validation images can come from."""
    if val_from not in ("train", "test"):
        raise ValueError(f"val_from must be 'train' or 'test', got {val_from!r}")
