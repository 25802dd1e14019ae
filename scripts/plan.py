"""Say where to cut a network: all planners on one device, link and server."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("plan")

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cleave.architectures.naming import whole_number
from cleave.lightning_modules.callbacks.tracking import log_report, recorded_outcome
from cleave.planning import (
    LayerGraph,
    Link,
    Plan,
    PlanOptions,
    Profile,
    RateTrace,
    Simulation,
    Task,
    every,
    every_plan,
    pareto,
    plan_work,
    simulate,
    write_plan,
)
from cleave.planning.candidates import Candidate, candidate_plan
from cleave.planning.profiles.checks import not_negative
from cleave.reports.csv_file import write_csv
from cleave.reports.planning.plots import gantt_plot, rates_plot
from cleave.reports.planning.tables import Row, plan_rows, print_plans, print_simulation
from cleave.reports.terminal import say
from cleave.scripts.assembly.building import instantiate_each, plain
from cleave.scripts.assembly.planning.following import say_what_follows
from cleave.scripts.assembly.planning.problem import Planned, Settings, plan_problem, read_settings
from cleave.scripts.assembly.planning.trained import read_candidates
from cleave.scripts.compare import check_output


@recorded_outcome()
def plan(cfg: DictConfig) -> dict[str, Plan]:
    """Plan as the config says, print and write what was found, and return the plans at the link's own rate by name."""
    output = Path(cfg.output or cfg.paths.output_dir)
    check_output(output)
    settings = read_settings(cfg)
    arrivals = every(not_negative("every", cfg.every, "seconds between tasks"), whole_number("tasks", cfg.tasks))
    check_trace(settings.link, arrivals)
    candidates = read_candidates(cfg.candidates or [], cfg.backbone.name, cfg.trust_checkpoint)
    planned = plan_problem(cfg, settings, output)
    loggers = instantiate_each(cfg.get("logger"))
    for logger in loggers:
        logger.log_hyperparams(plain(cfg))
    announce(cfg, settings, planned)
    plans = plans_at(settings.link, settings, planned, candidates)
    front = {each.planner: each for each in pareto(*problem_at(settings.link, settings, planned))}
    print_plans(f"{cfg.backbone.name} at {settings.link.up:g} Mbit/s; times in ms", plans)
    print_plans("The front of latency and throughput", front)
    best = plans[f"optimum ({settings.options.objective})"]
    tasks = [Task(time, plan_work(planned.graph, best, planned.device, planned.server)) for time in arrivals]
    simulated = simulate(tasks, settings.link)
    print_simulation(best.planner, simulated)
    rows = []
    for rate in settings.rates:
        rows += plan_rows(plans_at(at_rate(settings.link, rate), settings, planned, candidates), rate)
    own = plan_rows(plans | front, float(settings.link.up or math.nan))
    files = write_report(output, {"plans.csv": own, "rates.csv": rows}, pictures(planned, best, simulated, rows))
    write_plan(files["plan.json"], best, **described(cfg, settings, planned))
    for logger in loggers:
        logger.log_metrics({f"latency/{name}": each.latency for name, each in plans.items()})
        log_report(logger, "plans", list(own[0]), [list(row.values()) for row in own], files)
    for file in files.values():
        say(f"Written: {file}")
    say_what_follows(cfg, settings, planned, best, planned.graph.nodes.input_shape)
    return plans


def at_rate(link: Link, rate: float) -> Link:
    """Return a link with another constant rate up, and with as many times that down as before."""
    assert link.up is not None
    assert link.down is not None
    return dataclasses.replace(link, up=rate, down=rate * link.down / link.up, trace=None)


def check_trace(link: Link, arrivals: list[float]) -> None:
    """Refuse a trace that ends before the last task comes; ValueError names both."""
    if isinstance(link.trace, RateTrace) and link.trace.times[-1] <= arrivals[-1]:
        raise ValueError(
            f"link.trace ends at {link.trace.times[-1]:g} s, before the stream: the last of tasks={len(arrivals)} "
            f"comes at {arrivals[-1]:g} s; give a longer trace, fewer tasks, or a smaller every"
        )


def announce(cfg: DictConfig, settings: Settings, planned: Planned) -> None:
    """Say what is planned, and how long it takes on either machine alone."""
    graph, device, server = planned.graph, planned.device, planned.server
    say(
        f"{cfg.backbone.name}: {len(graph.nodes.nodes)} nodes, {len(graph.layers)} layers; "
        f"{device.machine} ({device.how}) {1e3 * device.total:.4g} ms, "
        f"{server.machine} ({server.how}) {1e3 * server.total:.4g} ms"
    )
    sent = settings.options.image_bytes(graph.images.count)
    bits = settings.options.bits
    say(f"An image is sent as {settings.options.image}: {sent:,} bytes; features at {bits} bits a number")


def problem_at(
    link: Link, settings: Settings, planned: Planned
) -> tuple[LayerGraph, Profile, Link, Profile, PlanOptions]:
    """Return what every planner takes."""
    return planned.graph, planned.device, link, planned.server, settings.options


def plans_at(link: Link, settings: Settings, planned: Planned, candidates: list[Candidate]) -> dict[str, Plan]:
    """Return the plans of all planners and candidates over a link, by name."""
    taken = problem_at(link, settings, planned)
    found = every_plan(*taken)
    for candidate in candidates:
        found[f"trained ({candidate.name})"] = candidate_plan(candidate, *taken)
    return found


def described(cfg: DictConfig, settings: Settings, planned: Planned) -> dict[str, Any]:
    """Return what the plan is one of: network and graph, machines, and the rate up."""
    machines = {"device": planned.device.machine, "server": planned.server.machine}
    return {"network": cfg.backbone.name, "digest": planned.graph.digest, **machines, "up": settings.link.up}


def pictures(planned: Planned, best: Plan, simulated: Simulation, rows: Sequence[Row]) -> dict[str, bytes]:
    """Return the Gantt chart of the best plan and, where there are rates, the plot over them."""
    found = {"gantt.png": gantt_plot(simulated, f"{len(simulated.done)} tasks under {best.planner}")}
    if rows:
        found["rates.png"] = rates_plot(rows, f"{planned.device.machine} to {planned.server.machine}")
    return found


def write_report(output: Path, tables: dict[str, list[Row]], drawn: dict[str, bytes]) -> dict[str, Path]:
    """Write the tables that are not empty as CSV, and the pictures; return all files of the report by their names."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("rates.csv", "rates.png"):  # those of an earlier plan would contradict this one
        (output / name).unlink(missing_ok=True)
    tables = {name: rows for name, rows in tables.items() if rows}
    for name, rows in tables.items():
        write_csv(output / name, rows)
    for name, picture in drawn.items():
        (output / name).write_bytes(picture)
    return {name: output / name for name in sorted({"plan.json", *tables, *drawn})}


def main(cfg: DictConfig) -> None:
    """Plan where to cut a network."""
    plan(cfg)
