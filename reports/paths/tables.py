"""The table of a search: a row for the local network and one for each path. It can be read back and searched again."""

from __future__ import annotations

import csv
import io
import math
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cleave.architectures.linking.path import Path
from cleave.planning import PathLoad, PathOption, PathProblem, SearchResult, TrainedPath

Row = dict[str, Any]
LOADS = tuple(field.name for field in fields(PathLoad))
PARAMS = tuple(name for name in LOADS if name.endswith("params"))
NEEDED = (*Path._fields, "local_seconds", "host_seconds", "accuracy")
"""The columns without which a table cannot be read back."""
COLUMNS = (
    "kind", *Path._fields, "accuracy", *LOADS, "throughput", "throughput_ratio", "throughput_local", "throughput_path",
    "average_accuracy", "value", "candidate", "stage", "order", "predicted", "best",
)  # fmt: skip


def path_rows(problem: PathProblem, result: SearchResult) -> list[Row]:
    """Return a row for the local network, as it is, and one for each path, trained or not.

    ``accuracy``, ``average_accuracy`` and ``value`` are ``None`` for paths that were not trained. Accuracies are
    fractions, throughputs images per second, and ``value`` is what the search made large.

    Args:
        problem: What was searched.
        result: What was found.
    """
    trained = {one.path: (order, one) for order, one in enumerate(result.trained)}
    candidates = set(problem.candidates())
    rows = [_row(problem, None, problem.original, problem.accuracy, problem.original_value)]
    for path, option in problem.paths.items():
        order, one = trained.get(path, (None, None))
        rows.append(_trained_row(problem, path, option, order, one) | {"candidate": path in candidates})
    best = [row for row in rows if tuple(row[name] for name in Path._fields) == (result.path or (None,) * 4)]
    best[0]["best"] = True
    return rows


def _trained_row(
    problem: PathProblem, path: Path, option: PathOption, order: int | None, one: TrainedPath | None
) -> Row:
    if one is None:
        return _row(problem, path, option, None, None)
    found = _row(problem, path, option, one.accuracy, one.value)
    return found | {"stage": one.stage, "order": order, "predicted": one.predicted}


def _row(
    problem: PathProblem, path: Path | None, option: PathOption, accuracy: float | None, value: float | None
) -> Row:
    does = option.throughput
    average = None if accuracy is None else does.average_accuracy(problem.accuracy, accuracy)
    row: Row = dict.fromkeys(COLUMNS)
    row |= {
        "kind": "original" if path is None else "skip" if path.skips else "cross",
        "accuracy": accuracy,
        "throughput": does.total,
        "throughput_ratio": does.ratio,
        "throughput_local": does.local,
        "throughput_path": does.path,
        "average_accuracy": average,
        "value": value,
        "best": False,
    }
    return row | asdict(option.load) | ({} if path is None else path._asdict())


@dataclass(frozen=True)
class PathTable:
    """What a table says of a local network and its paths.

    Attributes:
        original: What the local network asks alone.
        accuracy: Its accuracy, a fraction.
        loads: What each path asks of both sides.
        accuracies: The accuracy of each path that was trained.
    """

    original: PathLoad
    accuracy: float
    loads: Mapping[Path, PathLoad]
    accuracies: Mapping[Path, float]


def read_path_table(file: pathlib.Path | str) -> PathTable:
    """Read a table of paths, as a search or a benchmark writes it as CSV.

    The columns lout, hin, hout, lin, local_seconds, host_seconds and accuracy must be there. The row of the local
    network has no blocks, that of a skip-connection no hin and hout, and that of a path that was not trained no
    accuracy. The columns communication_seconds, local_params and host_params are read too; others are left alone.

    Raises:
        ValueError: A column is missing, a cell holds no number of its kind, a path appears twice, or the row of the
            local network is missing.
    """
    file = pathlib.Path(file)
    try:
        reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"), newline=""), strict=True)
        cells = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if missing := [name for name in NEEDED if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{file} is no table of paths: it lacks the columns {', '.join(missing)}")
    loads: dict[Path | None, PathLoad] = {}
    accuracies: dict[Path | None, float] = {}
    for number, row in enumerate(cells, 2):
        try:
            path = _path(row)
            if path in loads:
                raise ValueError(f"{'the local network' if path is None else f'the path {path}'} appears twice")
            loads[path] = _load(row)
            if (accuracy := _number(row, "accuracy")) is not None:
                if not 0 <= accuracy <= 1:
                    raise ValueError(f"accuracy must be of 0 to 1, got {accuracy:g}")
                accuracies[path] = accuracy
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if None not in accuracies:
        raise ValueError(f"{file} has no row of the local network with its accuracy: one without lout, hin, hout, lin")
    original, accuracy = loads[None], accuracies[None]
    paths = {path: load for path, load in loads.items() if path is not None}
    return PathTable(original, accuracy, paths, {path: accuracies[path] for path in paths if path in accuracies})


def _path(row: Mapping[str, str | None]) -> Path | None:
    """Return the path of a row, ``None`` for the local network's."""
    found: list[int | None] = []
    for name in Path._fields:
        text = (row[name] or "").strip()
        if text and not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name} must be the number of a block, or empty, got {text!r}")
        found.append(int(text) if text else None)
    lout, hin, hout, lin = found
    if found == [None] * 4:
        return None
    if lout is None or lin is None or (hin is None) != (hout is None):
        raise ValueError("a path has lout and lin, and both hin and hout or neither")
    if lin <= lout or (hin is not None and hout is not None and hin > hout) or (hin is None and lin == lout + 1):
        raise ValueError(
            f"{Path(lout, hin, hout, lin)} is no path: lout < lin, hin <= hout, and a skip leaves some out"
        )
    return Path(lout, hin, hout, lin)


def _load(row: Mapping[str, str | None]) -> PathLoad:
    values = {name: _number(row, name) or 0.0 for name in LOADS if name in row}
    if not (row["local_seconds"] or "").strip():
        raise ValueError("local_seconds is empty")
    for name in PARAMS:
        if not values.setdefault(name, 0.0).is_integer():
            raise ValueError(f"{name} must be a whole number, got {values[name]:g}")
    return PathLoad(
        values["local_seconds"],
        values["host_seconds"],
        values.get("communication_seconds", 0.0),
        int(values["local_params"]),
        int(values["host_params"]),
    )


def _number(row: Mapping[str, str | None], name: str) -> float | None:
    """Return the number in a cell, ``None`` where it is empty."""
    text = (row[name] or "").strip()
    try:
        value = float(text) if text else None
    except ValueError as error:
        raise ValueError(f"{name} must be a number, or empty, got {text!r}") from error
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {text!r}")
    return value
