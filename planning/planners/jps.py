"""JPS: several jobs over two adjacent cuts, ordered so that device and link both have work."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan, Stages
from cleave.planning.planners.problem import Problem
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile
from cleave.planning.simulation.flow_shop import completions, johnson_order, makespan


def jps(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> Plan:
    r"""Cut ``options.jobs`` equal jobs at two adjacent layers, and order them by Johnson's rule.

    With f the seconds on the device and g those of sending, cuts are taken in the order in which f grows and g falls.
    Behind the last one with f < g stands the first with f ≥ g: jobs cut at the former keep the link busy, jobs at the
    latter the device. Of all shares of the two the one of least makespan is taken,

    .. math:: \min_{0 \le m \le n} C_{\max}\bigl(m \times (f_{l-1}, g_{l-1}),\; (n - m) \times (f_l, g_l)\bigr)

    in a flow shop of two machines. After Duan and Wu, "Joint Optimization of DNN Partition and Scheduling for Mobile
    Cloud Computing", ICPP 2021. The server's time is ignored in the choice, as in the paper, and counts in the
    makespan that is reported; so does the answer.

    Limits: single tensors alone; and mixing two adjacent cuts is not always the best of all mixtures.

    Args:
        graph: The network, see :func:`layer_graph`.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options; ``jobs`` is n.

    Returns:
        A plan whose ``schedule`` holds the jobs in order. Its nodes and tensors are those of the cut that most jobs
        have; its stages are the means over the jobs.

    Raises:
        ValueError: A profile is of another network.
    """
    problem = Problem(graph, device, link, server, options)
    sets = problem.single_cuts()
    stages = problem.costs(sets).stages
    pairs = [(float(stages[0, cut]), float(stages[1, cut])) for cut in range(sets.shape[1])]
    line = cut_line(pairs)
    order = [line[i] for i in adjacent_mix([pairs[cut] for cut in line], options.jobs)]
    plans = {
        cut: problem.plan(sets[:, cut], "jps", "one job of a schedule", exact=False) for cut in dict.fromkeys(order)
    }
    return scheduled([plans[cut] for cut in order], link)


def cut_line(pairs: list[tuple[float, float]]) -> list[int]:
    """Return the numbers of the cuts that no other beats, by growing seconds on the device and falling ones of sending.

    Args:
        pairs: Seconds on the device and of sending of each cut.
    """
    kept: list[int] = []
    for cut in sorted(range(len(pairs)), key=lambda i: pairs[i]):
        if not kept or pairs[cut][1] < pairs[kept[-1]][1]:
            kept.append(cut)
    return kept


def adjacent_mix(pairs: list[tuple[float, float]], jobs: int) -> list[int]:
    """Return for each job in order which cut of a line it has: the best share of the two around the crossing.

    Args:
        pairs: Seconds on the device and of sending of each cut; the former grow, the latter fall.
        jobs: How many jobs.

    Example:
        >>> adjacent_mix([(0, 6), (2, 4), (5, 1)], 4)
        [1, 1, 1, 2]
    """
    behind = next((i for i, (f, g) in enumerate(pairs) if f >= g), len(pairs) - 1)
    before = max(0, behind - 1)
    best: tuple[float, list[int]] = (math.inf, [])
    for share in range(jobs + 1):
        mixed = [before] * share + [behind] * (jobs - share)
        order = [mixed[i] for i in johnson_order([pairs[cut] for cut in mixed])]
        best = min(best, (makespan([pairs[cut] for cut in order]), order))
    return best[1]


def scheduled(plans: list[Plan], link: Link) -> Plan:
    """Return one plan of several jobs in their order, with the server and the answer in its makespan."""
    most = max(plans, key=plans.count)
    stages = Stages(*(float(each) for each in np.mean([plan.stages for plan in plans], axis=0)))
    delays = (0.0, link.delay, link.delay)
    done = completions([plan.stages for plan in plans], delays)
    energies = [plan.energy for plan in plans if plan.energy is not None]
    shares = [(plan.sent[0].name if plan.sent else "nothing", plans.count(plan)) for plan in dict.fromkeys(plans)]
    words = " and ".join(f"{count} that send {name}" for name, count in shares)
    return dataclasses.replace(
        most,
        stages=stages,
        delay=float(np.mean([plan.delay for plan in plans])),
        energy=sum(energies) / len(plans) if energies else None,
        why=f"{len(plans)} jobs in Johnson's order: {words}; done after {max(done):.4g} s",
        schedule=tuple(plans),
        makespan=max(done),
    )
