"""Randomness that depends on (seed, epoch, index) alone, whoever asks and in whatever order."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

Key = tuple[int, int]
"""What a training sampler yields: (epoch, index)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers one to one (the finaliser of SplitMix64, Steele et al. 2014).

    Args:
        values: uint64 array of any shape.

    Returns:
        uint64 array of the same shape; distinct values stay distinct.
    """
    values = values.astype(np.uint64) + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def stream_seed(*parts: int | str) -> int:
    """Hash a few names and numbers to one 63-bit seed, so that (1, 0) and (0, 1) share nothing."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_seeds(seed: int, keys: list[Key]) -> np.ndarray:
    """Return one uint64 seed per (epoch, index): equal for equal (seed, epoch, index), else unrelated."""
    streams = np.array([stream_seed(seed, "augment", epoch) for epoch, _ in keys], dtype=np.uint64)
    indices = np.array([index for _, index in keys], dtype=np.uint64)
    return mix(streams ^ mix(indices))


def draw(seeds: np.ndarray, stream: int) -> np.ndarray:
    """Return the uint64 random number that a ``stream`` of every sample starts with."""
    return mix(seeds ^ mix(np.array([stream], dtype=np.uint64)))
