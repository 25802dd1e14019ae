"""A look at every picture file before training: what a loader would raise is found at once, and remembered."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import track

from .caching.cache import in_threads
from .sources import CorruptImageError, FileSource, ImageSource

_MANY = 500


def corrupt_pictures(
    source: ImageSource, load: Callable[[int], object], how: str, title: str
) -> dict[int, CorruptImageError]:
    """Read every picture once, in threads, as a loader would, and return the errors of those that it cannot use.

    Of files, what could be used is remembered in the user's cache folder by path, size and time of change, so that the
    next run looks at new and changed ones alone.

    Args:
        source: The pictures.
        load: What the loader does for an index.
        how: Says what ``load`` does; what was remembered of another is not used.
        title: What is shown beside the progress bar of a long look.

    Returns:
        Errors by index, in order.
    """
    memory, marks, todo = None, np.empty(0, dtype=np.uint64), np.arange(len(source))
    if isinstance(source, FileSource):
        memory = Memory(source.root, how)
        marks = np.array([_mark(source, index) for index in range(len(source))], dtype=np.uint64)
        todo = np.flatnonzero(~np.isin(marks, memory.good))
    outcome = in_threads(lambda i: load(int(todo[i])), len(todo))
    found = dict(zip(todo.tolist(), _shown(outcome, len(todo), title), strict=True))
    bad = {index: error for index, error in found.items() if error is not None}
    if memory and len(todo) > len(bad):
        memory.keep(np.delete(marks, list(bad)))
    return bad


class Memory:
    """The pictures of a folder that could be used when they were last looked at.

    Args:
        root: The folder.
        how: As of :func:`corrupt_pictures`.

    Attributes:
        good: Marks of the pictures, uint64 (N,), in ascending order.
    """

    def __init__(self, root: str, how: str) -> None:
        words = "\0".join([os.path.realpath(root), how, PIL.__version__])
        self.path = cache_folder() / f"{hashlib.sha256(words.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.npy"
        try:
            self.good = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            self.good = np.empty(0, dtype=np.uint64)

    def keep(self, marks: np.ndarray) -> None:
        """Write down the marks of what can be used, if the cache folder can be written to."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".npy", delete=False) as file:
                np.save(file, np.unique(np.concatenate([self.good, marks])))
            Path(file.name).replace(self.path)
        except OSError:
            return


def cache_folder() -> Path:
    """Return the folder of what can be made anew, ``$XDG_CACHE_HOME/cleave/pictures``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleave" / "pictures"


def _mark(source: FileSource, index: int) -> int:
    status = Path(source.name(index)).stat()
    words = f"{source.paths[index]}\0{status.st_size}\0{status.st_mtime_ns}"
    return int.from_bytes(hashlib.blake2b(words.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _shown(outcome: Iterable[CorruptImageError | None], count: int, title: str) -> Iterator[CorruptImageError | None]:
    console = Console()
    hidden = count < _MANY or not console.is_terminal or getattr(rank_zero_only, "rank", 0) != 0
    yield from track(outcome, title, count, console=console, transient=True, disable=hidden)
