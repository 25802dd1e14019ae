"""The tables of plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cleave.planning import Plan, Simulation
from cleave.planning.planners.plan import STAGES
from cleave.reports.terminal import number, say, table

Row = dict[str, Any]
HEADER = ("plan", "sent", "bytes", "T_e", "T_t", "T_c", "T_r", "latency", "tasks/s", "J", "accuracy", "exact")


def plan_rows(plans: Mapping[str, Plan], rate: float) -> list[Row]:
    """Return what plans come to at a rate, a row each, in seconds, bytes and joules.

    Args:
        plans: By name.
        rate: Mbit/s up.
    """
    return [
        {
            "plan": name,
            "rate": rate,
            "sent": " ".join(each.name for each in plan.sent),
            "tensors": plan.tensors,
            "bytes": plan.bytes,
            **{f"{stage}_seconds": seconds for stage, seconds in zip(STAGES, plan.stages, strict=True)},
            "latency": plan.latency,
            "bottleneck": plan.bottleneck,
            "throughput": plan.throughput,
            "bubbles": plan.bubbles,
            "energy": plan.energy,
            "accuracy": plan.accuracy,
            "exact": plan.exact,
            "why": plan.why,
        }
        for name, plan in plans.items()
    ]


def print_plans(title: str, plans: Mapping[str, Plan]) -> None:
    """Print plans as a table, times in milliseconds, and why each was chosen; columns that none fills are left out."""
    rows = [_cells(name, plan) for name, plan in plans.items()]
    kept = [i for i in range(len(HEADER)) if any(row[i] for row in rows)]
    table(title, [tuple(row[i] for i in kept) for row in rows], tuple(HEADER[i] for i in kept))
    for name, plan in plans.items():
        say(f"{name}: {plan.why}")


def print_simulation(name: str, found: Simulation) -> None:
    """Print what a stream of tasks under a plan came to."""
    middle, late, last = (1e3 * each for each in found.latency((0.5, 0.95, 1.0)))
    rows = [
        (stage, f"{1e3 * busy:.4g}", f"{1e3 * idle:.4g}")
        for stage, busy, idle in zip(STAGES, found.busy, found.idle, strict=True)
    ]
    title = (
        f"{len(found.done)} tasks under {name}: latency {middle:.4g} ms in the median, {late:.4g} at 95 %, "
        f"{last:.4g} at most; {found.throughput:.4g} tasks per second"
    )
    table(title, rows, ("station", "busy (ms)", "idle (ms)"))


def _cells(name: str, plan: Plan) -> tuple[str, ...]:
    return (
        name,
        shown([each.name for each in plan.sent]),
        number(plan.bytes),
        *(f"{1e3 * seconds:.4g}" for seconds in plan.stages),
        f"{1e3 * plan.latency:.4g}",
        f"{plan.throughput:.4g}",
        "" if plan.energy is None else f"{plan.energy:.3g}",
        "" if plan.accuracy is None else f"{100 * plan.accuracy:.2f} %",
        "yes" if plan.exact else "",
    )


def shown(names: Sequence[str]) -> str:
    """Return what is sent, for a cell: the first, and how many more."""
    if not names:
        return "nothing"
    return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")
