"""What a run measured, as points of bytes and accuracy in its ``results.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cleave.deployment.bundle.canonical_json import dump, parse

SCHEMA = 1
RESULTS = "results.json"
MAX_FILE_BYTES = 16 * 2**20
LIMIT = 2**63  # beyond it, a number is a mistake, and might fit no float
TEXTS = ("method", "label", "kind", "backbone", "checkpoint")
COUNTS = ("encoder_macs", "encoder_params", "epochs", "bits", "seed")
NUMBERS = ("accuracy", "payload_bytes", "payload_zstd_bytes", "train_seconds")


@dataclasses.dataclass(frozen=True)
class Point:
    """What a method scores with the bytes it sends.

    Args:
        method: The line of the plot it belongs to.
        label: What tells it from the method's other points, the same for every seed.
        accuracy: From 0 to 1.
        payload_bytes: Mean length of the real payload, in bytes per image; above 0.
        payload_zstd_bytes: The same after zstd.
        encoder_macs: Multiply-accumulates per image on the device.
        encoder_params: Parameters on the device; 0 where it runs no network.
        epochs: Epochs trained, those of all stages together.
        train_seconds: Time they took.
        bits: Width of a code.
        seed: Seed of the run.
        backbone: Name of the network that was split.
        checkpoint: The file that was measured.
        kind: ``run``, or ``baseline`` for what was not trained to be split.

    Raises:
        ValueError: A value is missing, of another type, or out of its range.
    """

    method: str
    label: str
    accuracy: float
    payload_bytes: float
    payload_zstd_bytes: float | None = None
    encoder_macs: int | None = None
    encoder_params: int | None = None
    epochs: int | None = None
    train_seconds: float | None = None
    bits: int | None = None
    seed: int | None = None
    backbone: str | None = None
    checkpoint: str | None = None
    kind: str = "run"

    def __post_init__(self) -> None:
        values = {field: getattr(self, field) for field in (*TEXTS, *COUNTS, *NUMBERS)}
        for name in ("method", "label"):
            if not values[name]:
                raise ValueError(f"has no {name}")
        check_accuracy(self.accuracy)
        if self.payload_bytes is None:
            raise ValueError("has no payload_bytes; the unsplit network, which sends none, goes in by reference=FILE")
        for name, value in values.items():
            kinds: Any = str if name in TEXTS else int if name in COUNTS else (int, float)
            if value is None:
                continue
            if not isinstance(value, kinds) or isinstance(value, bool):
                wanted = "text" if name in TEXTS else "a whole number" if name in COUNTS else "a number"
                raise ValueError(f"{name} must be {wanted} or null, got {value!r}")
            if name not in TEXTS and not 0 <= value < LIMIT:
                raise ValueError(f"{name} must be from 0 to below 2**63, got {value!r}")
        if self.payload_bytes == 0:
            raise ValueError("payload_bytes must be above 0, got 0")
        if self.kind not in ("run", "baseline"):
            raise ValueError(f"kind must be run or baseline, got {self.kind!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Point:
        """Read a point; keys it does not know are left alone, those that are missing are null.

        Args:
            values: Its values, checked here.
            where: The file and the place in it, for the error.
        """
        known: dict[str, Any] = {field.name: values.get(field.name) for field in dataclasses.fields(cls)}
        known |= {"label": known["label"] or known["method"], "kind": known["kind"] or "run"}
        try:
            point = cls(**known)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        whole: dict[str, Any] = {name: float(known[name]) for name in NUMBERS if isinstance(known[name], int)}
        return dataclasses.replace(point, **whole)


def check_accuracy(value: Any) -> float:
    """Return an accuracy; :class:`ValueError` unless it is a number from 0 to 1."""
    if value is None:
        raise ValueError("has no accuracy")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"accuracy must be a number from 0 to 1, got {value!r}")
    return value


def write_results(
    file: Path, points: Sequence[Point], kind: str = "run", path: Mapping[str, Any] | None = None
) -> None:
    """Write a ``results.json``; every point takes the kind of the file.

    Args:
        file: The file.
        points: The points.
        kind: ``run`` or ``baseline``.
        path: What a path through two networks costs, which no comparison reads.

    Raises:
        ValueError: ``kind`` is neither ``run`` nor ``baseline``.
    """
    rows = [dataclasses.asdict(dataclasses.replace(point, kind=kind)) for point in points]
    for row in rows:
        del row["kind"]
    more = {} if path is None else {"path": dict(path)}
    file.write_bytes(dump({"schema": SCHEMA, "kind": kind, "points": rows, **more}))


def read_results(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a ``results.json`` into (where, values) pairs, one a point, that :meth:`Point.from_dict` checks.

    Raises:
        ValueError: The file is too long, damaged, of another schema, or holds no points.
    """
    try:
        values = parse(content(file))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    found = values.get("schema") if isinstance(values, dict) else None
    if found != SCHEMA or isinstance(found, bool):
        raise ValueError(f"{file} has schema {found!r}; this version of Cleave reads {SCHEMA}")
    points = values.get("points")
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
        raise ValueError(f"{file} must hold a list of at least one point under 'points'")
    kind = values.get("kind", "run")
    return [(place(file, i, point), {**point, "kind": kind}) for i, point in enumerate(points)]


def content(file: Path) -> bytes:
    """Read a file of bounded length; :class:`ValueError` if it is longer."""
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, more than the {MAX_FILE_BYTES:,} allowed")
    return file.read_bytes()


def place(file: Path, index: int, values: Mapping[str, Any]) -> str:
    """Name a point of a file for an error."""
    name = values.get("label") or values.get("method")
    return f"{file}, point {index + 1}" + (f" ({name})" if name else "")
