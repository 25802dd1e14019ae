"""From run folders, bundles and files to the points they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cleave.deployment import read_manifest
from cleave.deployment.bundle.manifest import MANIFEST
from cleave.reports.csv_file import read_csv
from cleave.reports.rates.measured import in_words, measured_points
from cleave.reports.rates.results import RESULTS, Point, check_accuracy, read_results

KNOWN = f"run folders with a {RESULTS}, bundles, {RESULTS} files, or the rate_accuracy.csv of a report"


def collect(inputs: Iterable[str | Path]) -> list[Point]:
    """Read every point of the inputs; what is met twice, as a file or as an equal point, counts once.

    Args:
        inputs: Folders, searched through, and files.

    Raises:
        FileNotFoundError: A path does not exist, or a folder holds no results.
        ValueError: There are no inputs, or a file is damaged or holds a point that is not whole.
    """
    paths = [Path(str(path)) for path in inputs]
    if not paths:
        raise ValueError(f"inputs is empty; give inputs=[PATH,…]: {KNOWN}")
    files = {file.resolve(): file for path in paths for file in find(path)}
    points = [Point.from_dict(values, where) for file in files.values() for where, values in read(file)]
    return list(dict.fromkeys(points))


def find(path: Path) -> list[Path]:
    """Return the files with results at or below a path, in the order of their names."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; inputs are {KNOWN}")
    if path.is_file():
        return [path]
    results = sorted(path.rglob(RESULTS))
    runs = {file.parent for file in results}
    # The bundle that a run wrote says again what its results say.
    bundles = [
        file for file in sorted(path.rglob(MANIFEST)) if not (file.parent.name == "bundle" and file.parents[1] in runs)
    ]
    if not results and not bundles:
        raise FileNotFoundError(f"{path} and its subfolders hold neither a {RESULTS} nor a bundle's {MANIFEST}")
    return results + bundles


def read(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a file's points as (where, values) pairs, not yet checked."""
    if file.name == MANIFEST:
        return [(str(file), values) for values in bundle_values(file)]
    return read_csv(file) if file.suffix == ".csv" else read_results(file)


def bundle_values(file: Path) -> list[dict[str, Any]]:
    """Return what a bundle's manifest says was tested, for every width, and what its first partition costs.

    An unsplit network has an accuracy alone.

    Raises:
        ValueError: The manifest is damaged, or its config is not one of train.py.
    """
    manifest = read_manifest(file.parent)
    device, config = manifest.partition(manifest.route.order[0]), manifest.config
    cost = {"encoder": {"macs": device.macs or 0, "params": device.params}}
    try:
        # The config is that of a recipe's last stage, which knows the others by their names.
        stages = config.get("stages")
        method = " → ".join(stages.values()) if stages else in_words(config["method"]["_target_"])
        known = {"epochs": None, "seconds": None, "checkpoint": None}
        points = measured_points(config, method, manifest.metrics, cost, **known)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: metrics and config do not say what was measured: {error}") from error
    if not points:
        return [{"method": method, "accuracy": manifest.metrics.get("test/acc")}]
    return [{**dataclasses.asdict(point), "encoder_macs": device.macs} for point in points]


def reference_accuracy(source: str | float) -> float:
    """Return the accuracy of the unsplit network: a number, or what its bundle or ``results.json`` says.

    Raises:
        FileNotFoundError: The path does not exist, or the folder holds no results.
        ValueError: It holds several points, or one without accuracy, or the accuracy is not from 0 to 1.
    """
    rows: list[tuple[str, dict[str, Any]]] = [("reference", {"accuracy": source})]
    if isinstance(source, str):
        rows = [row for file in find(Path(source)) for row in read(file)]
    if len(rows) != 1:
        raise ValueError(f"reference={source} holds {len(rows)} points; give the results of one unsplit network")
    ((where, values),) = rows
    try:
        return check_accuracy(values.get("accuracy"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
