"""From run folders, bundles and files to the points they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deployment import read_manifest
from deployment.manifest import MANIFEST
from scripts.report_csv import read_csv
from scripts.results import RESULTS, Point, check_accuracy, read_results

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


def reference_accuracy(path: str | Path) -> float:
    """Return the accuracy of the unsplit network, from its run folder, bundle or ``results.json``.

    Raises:
        FileNotFoundError: The path does not exist, or the folder holds no results.
        ValueError: It holds several points, or one without accuracy.
    """
    rows = [row for file in find(Path(str(path))) for row in read(file)]
    if len(rows) != 1:
        raise ValueError(f"reference={path} holds {len(rows)} points; give the results of one unsplit network")
    ((where, values),) = rows
    try:
        return check_accuracy(values.get("accuracy"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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
        return [(str(file), bundle_values(file.parent))]
    return read_csv(file) if file.suffix == ".csv" else read_results(file)


def bundle_values(directory: Path) -> dict[str, Any]:
    """Return what a bundle's manifest says of its one point: what was tested, and the cost of its first partition."""
    manifest = read_manifest(directory)
    device, metrics, config = manifest.partition(manifest.route[0]), manifest.metrics, manifest.config
    target = _entry(config, "method", "_target_") or directory.name
    method = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target.rpartition(".")[2]).lower()
    bits, epochs = _entry(config, "codec", "bits"), _entry(config, "trainer", "max_epochs")
    return {
        "method": method,
        "label": method if bits is None else f"{method} {bits} bits",
        "accuracy": metrics.get("test/acc"),
        "payload_bytes": metrics.get("test/payload_bytes"),
        "payload_zstd_bytes": metrics.get("test/payload_zstd_bytes"),
        "encoder_macs": device.macs,
        "encoder_params": device.params,
        "epochs": None if epochs == -1 else epochs,
        "bits": bits,
        "seed": config.get("seed"),
        "backbone": _entry(config, "backbone", "name"),
    }


def _entry(config: dict[str, Any], group: str, key: str) -> Any:
    found = config.get(group)
    return found.get(key) if isinstance(found, dict) else None
