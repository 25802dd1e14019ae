"""Outputs of frozen networks on disk: computed once, mapped into memory, and found again by what they were made of."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16}
FORMAT = 1
"""Raised with every change to the files or to what preprocessing makes of a picture, so that no old entry fits."""

SAMPLE_TOLERANCE = 1e-2
"""Distance, relative to its norm, at which a stored row is no longer what the network computes: above float16's."""

_META = "meta.json"
_MAX_META_BYTES = 2**20
_ENTRY = re.compile("[0-9a-f]{16}")
_PARTIAL = ".partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FeatureCacheError(ValueError):
    """A feature cache cannot be written or used; the message names the folder and the fix."""


class FeatureCache:
    """Rows of named features in memory-mapped files, which workers and ranks share instead of copying.

    Args:
        folder: The entry's folder.
        names: Names of the features in it.
        views: Augmented views of every image that it holds, one after the other.
    """

    def __init__(self, folder: Path, names: Iterable[str], views: int = 1) -> None:
        self.folder = folder
        self.names = sorted(names)
        self.views = views
        self._arrays: dict[str, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}  # a spawned worker maps the files anew

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The features by name, each (views * images, ...), read-only.

        Raises:
            FeatureCacheError: A file is gone, cut short or damaged.
        """
        if self._arrays is None:
            self._arrays = {name: self._map(number) for number, name in enumerate(self.names)}
        return self._arrays

    @property
    def nbytes(self) -> int:
        """Bytes of all features together."""
        return sum(array.nbytes for array in self.arrays.values())

    def batch(self, rows: np.ndarray | Sequence[int]) -> dict[str, Tensor]:
        """Return a copy of some rows of every feature, as stored: float32 or float16."""
        return {name: torch.from_numpy(array[np.asarray(rows)]) for name, array in self.arrays.items()}

    def _map(self, number: int) -> np.ndarray:
        path = self.folder / f"{number}.npy"
        try:
            array = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
        except (OSError, ValueError) as error:
            reason = (
                "is not there; every rank must reach the folder"
                if isinstance(error, FileNotFoundError)
                else f"is damaged or cut short ({error})"
            )
            raise FeatureCacheError(f"{path} {reason}; {_remedy(self.folder)}") from error
        if array.offset + array.nbytes != path.stat().st_size:
            raise FeatureCacheError(f"{path} has bytes behind its array; {_remedy(self.folder)}")
        return np.asarray(array)  # rows of a plain array are taken faster


def entry_folder(root: Path, components: Mapping[str, Any]) -> Path:
    """Return where the entry of these components lies: 16 hexadecimal digits of their SHA-256 below ``root``."""
    return root / hashlib.sha256(json.dumps(components, sort_keys=True).encode()).hexdigest()[:16]


def check_root(root: Path) -> None:
    """Refuse a folder that is in use for something else.

    Raises:
        FeatureCacheError: ``root`` is a file, one entry of a cache, or a folder that holds other things.
    """
    if not root.exists():
        return
    if not root.is_dir():
        raise FeatureCacheError(f"directory={str(root)!r} is a file; give a folder for the feature cache")
    if (root / _META).exists():
        raise FeatureCacheError(f"directory={str(root)!r} is one entry of a feature cache; give {str(root.parent)!r}")
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    if foreign := [name for name in names if not _ENTRY.fullmatch(name)]:
        raise FeatureCacheError(
            f"directory={str(root)!r} is no feature cache: it holds {foreign[:5]}; give a new or empty folder"
        )


def open_entry(root: Path, components: Mapping[str, Any]) -> FeatureCache | None:
    """Find what was computed for exactly these components.

    Args:
        root: Folder of the cache.
        components: What the features depend on, as JSON can hold it. ``features`` maps names to shapes
            (views * images, ...), ``dtype`` is a key of ``DTYPES``, ``transform`` counts the ``views``.

    Returns:
        The entry, or ``None`` where there is none.

    Raises:
        FeatureCacheError: ``root`` is no place for a cache, or the entry is damaged or holds something else.
    """
    check_root(root)
    folder = entry_folder(root, components)
    if not folder.exists():
        return None
    wanted = json.loads(json.dumps(components))
    found = _read_meta(folder)
    if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        name = differing[0]
        raise FeatureCacheError(
            f"{folder} belongs to another run: it differs in {', '.join(differing)} ({name} is "
            f"{_brief(found.get(name))} there and {_brief(wanted.get(name))} here); {_remedy(folder)}"
        )
    cache = FeatureCache(folder, wanted["features"], wanted["transform"]["views"])
    for name, array in cache.arrays.items():
        if list(array.shape) != wanted["features"][name] or array.dtype != wanted["dtype"]:
            raise FeatureCacheError(
                f"{folder} holds {name!r} as {array.dtype} {list(array.shape)} instead of {wanted['dtype']} "
                f"{wanted['features'][name]}; {_remedy(folder)}"
            )
    return cache


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / _META
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_MAX_META_BYTES))
    except (OSError, ValueError) as error:
        raise FeatureCacheError(f"{path} cannot be read ({error}); {_remedy(folder)}") from error
    if not isinstance(found, dict):
        raise FeatureCacheError(f"{path} does not describe a feature cache; {_remedy(folder)}")
    return found


def write_entry(root: Path, components: Mapping[str, Any], batches: Iterable[Mapping[str, Tensor]]) -> FeatureCache:
    """Write the features of a whole split, in order, into a new entry.

    They are written into a folder of another name, which is renamed at the end: whatever goes wrong, nothing
    half-written is ever found. Of two runs that write the same entry at once, the first one to end wins.

    Args:
        root: Folder of the cache; it is made where it is missing.
        components: As of :func:`open_entry`.
        batches: Features (B, ...) by name, batch after batch.

    Raises:
        FeatureCacheError: The disk is full, or a feature has another shape than its component says, is not finite, or
            lies beyond the range of float16.
    """
    folder = entry_folder(root, components)
    root.mkdir(parents=True, exist_ok=True)
    _check_space(root, components)
    partial = root / f"{_PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir()
        _write_features(partial, components, batches)
        (partial / _META).write_text(json.dumps(components, indent=1))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster
                raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise FeatureCacheError(f"{_space_needed(root, components)}, and the disk ran full ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    cache = open_entry(root, components)
    assert cache is not None
    return cache


def _write_features(folder: Path, components: Mapping[str, Any], batches: Iterable[Mapping[str, Tensor]]) -> None:
    shapes, dtype = components["features"], components["dtype"]
    rows = 0
    # Written as files, not through the map: on a full disk a map ends the process with SIGBUS.
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / f"{number}.npy").open("wb"))
            for number, name in enumerate(sorted(shapes))
        }
        for name, file in files.items():
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shapes[name])}
            np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            check_shapes(batch, shapes)
            for name, file in files.items():
                file.write(_stored(name, batch[name], dtype).data)
            rows += len(batch[next(iter(files))])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if any(rows != shape[0] for shape in shapes.values()):
        raise FeatureCacheError(f"{rows} rows were computed where the features {dict(shapes)} were announced")


def check_shapes(batch: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise a FeatureCacheError unless a batch of features has the announced names and shapes."""
    lengths = {len(value) for value in batch.values()}
    got = {name: list(value.shape[1:]) for name, value in batch.items()}
    wanted = {name: list(shape[1:]) for name, shape in shapes.items()}
    if got != wanted or len(lengths) > 1:
        raise FeatureCacheError(f"features must have the same names and shapes in every batch: {wanted}, now {got}")


def check_sample(cache: FeatureCache, rows: np.ndarray, expected: Mapping[str, Tensor]) -> None:
    """Hold some stored rows against what the network computes now, in case its fingerprint or the disk has lied.

    Raises:
        FeatureCacheError: They are further apart than rounding can explain.
    """
    for name, stored in cache.batch(rows).items():
        wanted = expected[name].detach().cpu().double().flatten(1)
        distance = (stored.double().flatten(1) - wanted).norm(dim=1)
        if not bool((distance <= SAMPLE_TOLERANCE * wanted.norm(dim=1) + 1e-6).all()):
            raise FeatureCacheError(
                f"{cache.folder} does not hold what the network computes as {name!r}; {_remedy(cache.folder)}"
            )


def _stored(name: str, value: Tensor, dtype: str) -> np.ndarray:
    value = value.detach()
    if not bool(torch.isfinite(value).all()):
        raise FeatureCacheError(
            f"the feature {name!r} has values that are not finite; the network's weights are at fault"
        )
    stored = value.to(DTYPES[dtype])
    if not bool(torch.isfinite(stored).all()):
        most = float(value.abs().max())
        raise FeatureCacheError(
            f"the feature {name!r} reaches {most:.6g}, beyond the range of {dtype} "
            f"(±{torch.finfo(DTYPES[dtype]).max:.6g}); use dtype=float32"
        )
    return stored.cpu().contiguous().numpy()


def _bytes_needed(components: Mapping[str, Any]) -> int:
    values = sum(int(np.prod(shape)) for shape in components["features"].values())
    return values * np.dtype(components["dtype"]).itemsize


def _space_needed(root: Path, components: Mapping[str, Any]) -> str:
    return f"caching the features {sorted(components['features'])} takes {_bytes_needed(components):,} bytes in {root}"


def _check_space(root: Path, components: Mapping[str, Any]) -> None:
    free = shutil.disk_usage(root).free
    if free >= _bytes_needed(components) + _MAX_META_BYTES:
        return
    fix = "delete entries no longer needed or give another directory"
    if components["dtype"] != "float16":
        fix += ", or use dtype=float16, which takes half"
    if left := sorted(path.name for path in root.glob(f"{_PARTIAL}*")):
        fix += f"; unfinished ones lie there as well, {left[:3]}, which may go unless their run is still writing"
    raise FeatureCacheError(f"{_space_needed(root, components)}, where {free:,} are free; {fix}")


def _remedy(folder: Path) -> str:
    return f"delete {folder} and it is computed anew"


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}..."
