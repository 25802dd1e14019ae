"""Compare runs, bundles and baselines: accuracy over payload bytes, and the trade-off with parameters on the device."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("compare")

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cleave.architectures.naming import did_you_mean
from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.reports.csv_file import write_csv
from cleave.reports.rates.collect import collect, reference_accuracy
from cleave.reports.rates.fronts import Setting, settings, trade_offs
from cleave.reports.rates.plots import rate_plot, tradeoff_plot
from cleave.reports.rates.results import Point
from cleave.reports.rates.tables import print_tables
from cleave.reports.terminal import say
from cleave.reports.written import naming_output, try_file
from cleave.scripts.assembly.building import instantiate_each, plain


@recorded_outcome()
def compare(cfg: DictConfig) -> dict[str, Path]:
    """Collect the points, print them, write tables and plots, and return the files written by their names."""
    output = Path(cfg.output or cfg.paths.output_dir)
    check_output(output)
    points = of_backbone(collect([cfg.inputs] if isinstance(cfg.inputs, str) else cfg.inputs or []), cfg.backbone.name)
    reference = None if cfg.reference is None else reference_accuracy(cfg.reference)
    known = settings(points)
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams(plain(cfg))
    print_tables(known, reference)
    files = write_report(output, points, reference, title=cfg.title, log_x=cfg.log_x)
    for logger in loggers:
        log_settings(logger, known, files)
    for file in files.values():
        say(f"Written: {file}")
    return files


def check_output(output: Path) -> None:
    """Refuse an output folder that could not be made or written, before anything is done for it.

    Raises:
        NotADirectoryError: A file is in its way.
        OSError: Nothing can be written there.
    """
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"output={output} must be a folder, but {there} is a file; give another output=DIR")
    with naming_output(output):
        try_file(output / ".tried")


def of_backbone(points: Sequence[Point], name: str | None) -> list[Point]:
    """Return the points of one backbone, or all of them; ValueError where there are none of it."""
    if name is None:
        return list(points)
    if chosen := [point for point in points if point.backbone == name]:
        return chosen
    known = sorted({point.backbone for point in points if point.backbone})
    raise ValueError(
        f"no point is of backbone.name={name}; there are {', '.join(known) or 'none with a backbone'}."
        + did_you_mean(str(name), known)
    )


def write_report(
    output: Path, points: Sequence[Point], reference: float | None, *, title: str | None = None, log_x: bool = True
) -> dict[str, Path]:
    """Write ``rate_accuracy`` and, where parameters are known, ``tradeoff``, each as CSV and PNG.

    Args:
        output: The folder, made where it is missing.
        points: What was measured; the first table keeps every point, the second the means over seeds.
        reference: Accuracy of the unsplit network.
        title: Above the plots.
        log_x: Whether the axis of bytes is logarithmic.
    """
    known = settings(points)
    rows = [row for group in trade_offs(known).values() for row in group]
    pictures = {"rate_accuracy.png": rate_plot(known, reference, title, log_x)}
    tables = {"rate_accuracy.csv": [dataclasses.asdict(p) for p in sorted(points, key=_order)]}
    if rows:
        pictures["tradeoff.png"] = tradeoff_plot(known, title, log_x)
        tables["tradeoff.csv"] = [{**dataclasses.asdict(row.setting), "front": int(row.front)} for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    for name in ("tradeoff.png", "tradeoff.csv"):  # those of an earlier report would contradict this one
        (output / name).unlink(missing_ok=True)
    for name, table in tables.items():
        write_csv(output / name, table)
    for name, picture in pictures.items():
        (output / name).write_bytes(picture)
    return {name: output / name for name in sorted({*tables, *pictures})}


def _order(point: Point) -> tuple[Any, ...]:
    return point.kind != "run", point.method, point.payload_bytes, point.label, str(point.seed)


def log_settings(logger: Any, known: Sequence[Setting], files: dict[str, Path]) -> None:
    """Give a logger the best accuracy of each method; W&B also gets the plots, the settings and the CSV files."""
    best = {s.method: s.accuracy for s in sorted(known, key=lambda s: s.accuracy)}
    logger.log_metrics({f"best_accuracy/{method}": accuracy for method, accuracy in best.items()})
    rows = [list(dataclasses.asdict(each).values()) for each in known]
    named = {name.removesuffix(".csv"): file for name, file in files.items()}
    log_report(logger, "settings", [field.name for field in dataclasses.fields(Setting)], rows, named)


def main(cfg: DictConfig) -> None:
    """Compare what was measured."""
    compare(cfg)
