"""Report on early exits: what each policy saves at which accuracy, and a policy to export."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("exits_report")

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from cleave.architectures import StagedNetwork
from cleave.datamodules import ImageDataModule
from cleave.deployment import ExitPolicy
from cleave.deployment.bundle.canonical_json import dump
from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.planning import Calibrated, fit_temperatures
from cleave.reports.exits.measure import exit_costs, stored_logits
from cleave.reports.exits.place import place
from cleave.reports.exits.plots import accuracy_plot, exits_plot, shares_plot
from cleave.reports.exits.points import Study, bounds, choose, exit_figures, policy_figures
from cleave.reports.exits.tables import csv_rows, print_report
from cleave.reports.exits.timing import timed_batches, wall_clock
from cleave.reports.terminal import say
from cleave.reports.written import write_files
from cleave.scripts.assembly.building import instantiate_each, plain
from cleave.scripts.assembly.exits_settings import checked
from cleave.scripts.assembly.hints import next_command, vouching
from cleave.scripts.assembly.restoring import restore, restore_data

SCHEMA = 1
REPORT, POLICY = "exits_report", "exit_policy.json"
PLOTS = {"exits_accuracy": accuracy_plot, "exits_shares": shares_plot, "exits_alone": exits_plot}


@recorded_outcome()
def exits_report(cfg: DictConfig) -> dict[str, Path]:
    """Measure what the config asks for, print it, and return the files written by their names."""
    settings = checked(cfg)
    device = torch.device(cfg.device)
    restored = restore(cfg.ckpt_path, trusted=cfg.trust_checkpoint)
    network = restored.network
    if not network.exits:
        raise ValueError(
            f"{cfg.ckpt_path} holds a network without early exits; train one by method=exits_joint, exits_distilled, "
            "exits_separate or zero_time_waste"
        )
    data = restore_data(restored, cfg.data)
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams({**plain(cfg), "trained": plain(restored.config)})
    report, policy = measured(network.to(device).eval(), data, settings, device)
    print_report(report)
    files = write_report(Path(cfg.paths.output_dir), report, policy)
    for logger in loggers:
        log_points(logger, report, files)
    for file in files.values():
        say(f"Written: {file}")
    if POLICY in files:
        settings = {"ckpt_path": cfg.ckpt_path, "exits.policy_file": files[POLICY]}
        next_command("export", settings | vouching(plain(restored.config)))
    return files


def measured(
    network: StagedNetwork, data: ImageDataModule, settings: dict[str, Any], device: torch.device
) -> tuple[dict[str, Any], ExitPolicy | None]:
    """Return everything that is reported as plain values, and the policy that was chosen."""
    data.prepare_data()
    timing, chosen = settings["timing"], settings["choose"]
    batches = timed_batches(data, timing["batch_size"], max(1, timing["batches"]), device)
    costs = exit_costs(settings["costs"], network, batches, timing["batches"])
    val, test = (stored_logits(network, data, split, device) for split in ("val", "test"))
    temperatures = fit_temperatures(*val) if settings["temperatures"] else None
    how = (settings["scheme"], settings["shared"], temperatures, settings["fit_ensemble"])
    study = Study(network, costs, val, test, *how)
    found = choose(study, chosen) if chosen else None
    placed = None if settings["placement"]["exits"] is None else place(study, settings["placement"])
    seconds: dict[str, Any] = {}
    if found is not None:
        seconds["batch"] = wall_clock(network, found.policy, batches, timing["batches"])
        single = timed_batches(data, 1, max(1, timing["limit"]), device)
        seconds["single"] = wall_clock(network, found.policy, single, timing["limit"])
    report = {
        "schema": SCHEMA,
        "checkpoint": str(settings["ckpt_path"]),
        "images": {"val": len(val.labels), "test": len(test.labels)},
        "budgets": settings["budgets"],
        "scheme": settings["scheme"],
        "shared": settings["shared"],
        "temperatures": None if temperatures is None else list(temperatures),
        "backbone_macs": network.backbone_macs,
        "fit_ensemble": settings["fit_ensemble"],
        "worse_ensembles": study.worse() if "ensemble" in settings["policies"] else [],
        "costs": {"unit": costs.unit, "backbone": costs.backbone, "exits": costs.exits},
        "exits": (exits := exit_figures(study)),
        "last_exit": {"accuracy": exits[-1]["accuracy"], "cost": costs.last / costs.backbone},
        "policies": {
            kind: policy_figures(study, kind, settings["budgets"], settings["curve"]) for kind in settings["policies"]
        },
        **bounds(study),
        "seconds": seconds,
        "placement": placed,
        "chosen": None if found is None else {"kind": found.policy.kind, **chosen_point(study, found, chosen)},
    }
    return report, None if found is None else found.policy


def chosen_point(study: Study, found: Calibrated, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the chosen policy achieves, and what it was chosen by."""
    by_drop = settings["drop"] is not None
    return study.point(found, None if by_drop else settings["budget"]) | {"drop": settings["drop"]}


def write_report(output: Path, report: dict[str, Any], policy: ExitPolicy | None) -> dict[str, Path]:
    """Write the report as JSON, CSV and pictures, and the policy for ``export.py``."""
    contents = {f"{REPORT}.json": dump(report)} | {f"{name}.png": draw(report) for name, draw in PLOTS.items()}
    if policy is not None:
        contents[POLICY] = dump(policy.to_dict())
    (output / POLICY).unlink(missing_ok=True)  # that of an earlier report would contradict this one
    return write_files(output, contents, f"{REPORT}.csv", csv_rows(report))


def log_points(logger: Any, report: dict[str, Any], files: dict[str, Path]) -> None:
    """Give a logger the accuracies; W&B also gets the plots, the table of points and the files."""
    metrics = {f"best_accuracy/{kind}": figures["best"]["accuracy"] for kind, figures in report["policies"].items()}
    for kind, figures in report["policies"].items():
        kept = [point for point in figures["points"] if point["accuracy"] is not None]
        metrics |= {f"accuracy_at_{100 * point['budget']:g}/{kind}": point["accuracy"] for point in kept}
    logger.log_metrics(metrics | {f"acc_exit/{exit['name']}": exit["accuracy"] for exit in report["exits"]})
    rows = csv_rows(report)
    log_report(logger, "points", list(rows[0]), [list(row.values()) for row in rows], files)


def main(cfg: DictConfig) -> None:
    """Report on early exits."""
    exits_report(cfg)
