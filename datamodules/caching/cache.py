"""Decoded pictures in one block of memory, which workers share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ..sources import CorruptImageError

AUTO_CACHE_BYTES = 2**30
"""With ``cache="auto"`` a split is cached when its decoded pictures take at most this many bytes."""

_CHUNK = 128


class PixelCache:
    """uint8 arrays of any shapes, one after the other in a single buffer.

    Args:
        shapes: Shape of every picture's array, all of one rank; at least one picture.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = np.array(shapes, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1))])
        self._storage = torch.empty(int(self.offsets[-1]), dtype=torch.uint8)
        self._view()

    def _view(self) -> None:
        self.pixels: np.ndarray = self._storage.numpy()
        uniform = bool((self.shapes == self.shapes[0]).all())
        self._block = self.pixels.reshape(len(self.shapes), *self.shapes[0]) if uniform else None

    def __getstate__(self) -> dict[str, Any]:
        # The tensor alone: spawned workers then share its memory, while arrays would be copied to each of them.
        return {"shapes": self.shapes, "offsets": self.offsets, "_storage": self._storage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view()

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def nbytes(self) -> int:
        """Bytes of all pictures together."""
        return self.pixels.nbytes

    def __getitem__(self, index: int) -> np.ndarray:
        """Return picture ``index`` without a copy."""
        if self._block is not None:
            return self._block[index]
        return self.pixels[self.offsets[index] : self.offsets[index + 1]].reshape(self.shapes[index])

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Return the pictures at ``indices`` as one array; all must have one shape."""
        if self._block is not None:
            return self._block[indices]
        return np.stack([self[int(index)] for index in indices])

    def fill(self, load: Callable[[int], np.ndarray]) -> None:
        """Store ``load(index)`` for every index, decoding in parallel threads.

        Raises:
            CorruptImageError: The one of the first picture that cannot be decoded.
        """

        def store(index: int) -> None:
            self[index][...] = load(index)

        for error in in_threads(store, len(self)):
            if error is not None:
                raise error


def in_threads(work: Callable[[int], object], count: int) -> Iterator[CorruptImageError | None]:
    """Run ``work(0)`` … ``work(count - 1)`` in as many threads as there are cores.

    Args:
        work: What to do for an index; Pillow's decoders release the interpreter lock.
        count: Number of indices.

    Yields:
        For every index in order ``None``, or the ``CorruptImageError`` that it ended in.
    """

    def chunk(start: int) -> list[CorruptImageError | None]:
        outcome: list[CorruptImageError | None] = []
        for index in range(start, min(start + _CHUNK, count)):
            try:
                work(index)
                outcome.append(None)
            except CorruptImageError as error:
                outcome.append(error)
        return outcome

    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for outcome in pool.map(chunk, range(0, count, _CHUNK)):
            yield from outcome
    finally:
        pool.shutdown(cancel_futures=True)
