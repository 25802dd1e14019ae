"""DADS: minimum cuts of a network's graph, for a lightly and for a heavily loaded system."""

from __future__ import annotations

import bisect
import dataclasses
import math

import numpy as np

from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.graphs.min_cut import min_cut
from cleave.planning.planners.additive import additive
from cleave.planning.planners.optimum import candidate_sets, enumerated
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan
from cleave.planning.planners.problem import Problem
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile

COARSE, FINER = 0.5, 4
"""First step of the search over weights, as a power of two, and by how much each further step is finer."""
ENOUGH = 1e-3
"""Share of the longest stage below which a finer step is the last."""
MOST = 40.0
"""Largest power of two of a weight."""


def dads_light(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> Plan:
    r"""Minimise the latency of one task by a minimum cut.

    .. math:: \min_S \; T_e(S) + T_t(S) + T_c(S)

    over all closed sets S, several tensors included. After Hu, Bao, Wang and Liu, "Dynamic Adaptive DNN Surgery for
    Inference Acceleration on the Edge", INFOCOM 2019, section III-B (DSL). A value that several nodes read is sent
    once, the images are on the device, and no edge leads back from the server.

    Limits: it is the optimum of the sum, one stage after the other; what is sent while the device still computes
    shortens that.

    Args:
        graph: The network, see :func:`layer_graph`.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options.

    Raises:
        ValueError: A profile is of another network.
    """
    problem = Problem(graph, device, link, server, options)
    members = min_cut(graph, additive(problem))
    return problem.plan(members, "dads_light", "a minimum cut: the least latency there is", exact=True)


def dads_heavy(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> Plan:
    r"""Make the longest stage short by weighted minimum cuts; arguments as of :func:`dads_light`.

    .. math:: \min_S \max\{T_e(S), T_t(S), T_c(S)\} \quad\text{(NP-hard)}

    by :math:`\arg\min_S \alpha T_e(S) + T_t(S) + \gamma T_c(S)` for many α and γ. Of what they find the division of the
    shortest longest stage is kept; then finer steps around its α and γ follow, until they gain no more. After Hu, Bao,
    Wang and Liu, INFOCOM 2019, section III-C, algorithm 2 (DSH) and theorem 1: as α = γ = 1 is among them, the longest
    stage is at most three times the least, and four times where the answer's way back is a stage too.

    The paper steps α and γ by 1 from 0 to ΣF_e / min F_t and ΣF_c / min F_t, thousands to millions of cuts; here they
    are powers of √2, up and down as far. The least weighted sum is read off all closed sets, where they can be
    enumerated: a minimum cut finds no other. Beyond, it is the least of the cuts that ``optimum`` looks at too.

    ``why`` tells the gap to the true optimum, or what is known of it.
    """
    problem = Problem(graph, device, link, server, dataclasses.replace(options, exact=False))
    known = enumerated(problem)
    if known is None:
        # The cut of theorem 1: the least sum of the stages, without the time under way.
        light = min_cut(graph, dataclasses.replace(additive(problem), away=0.0, back=0.0))
        sets = np.concatenate([light[:, None], candidate_sets(problem)], axis=1)
        costs = problem.costs(sets)
    else:
        sets, costs = known
    best = _search(costs.stages, _largest_power(problem))
    plan = problem.plan(sets[:, best], "dads_heavy", "", exact=False)
    promised = 3 + bool(costs.stages[3].any())
    why = f"weighted minimum cuts, at most {promised} times the least longest stage"
    if known is None:
        # No stage is longer than the least sum, of which the longest has at least its share.
        ratio = promised * plan.bottleneck / float(costs.stages[:, 0].sum() or 1.0)
        return dataclasses.replace(plan, why=f"{why}; here at most {min(max(ratio, 1.0), promised):.3f} times it")
    least = float(costs.bottleneck.min())
    return dataclasses.replace(plan, why=f"{why}; here {plan.bottleneck / least if least else 1.0:.3f} times it")


def _largest_power(problem: Problem) -> float:
    """Return up to which power of two weights matter: beyond, no sum of seconds outweighs the smallest message."""
    up = [seconds for value in problem.graph.values if (seconds := problem.link.up_seconds(problem.value_bytes(value)))]
    most = max(problem.device_seconds.sum(), problem.server_seconds.sum()) / min(up)
    return min(MOST, COARSE * math.ceil(math.log2(max(2.0, most)) / COARSE))


def _search(stages: np.ndarray, largest: float) -> int:
    """Return which division of some (4, N) algorithm 2 ends with."""
    numbers = _unbeaten(stages)
    parts = stages[:, numbers]
    longest, step = parts.max(0), COARSE
    first, second = (np.arange(-largest, largest + step / 2, step) for _ in range(2))
    chosen, kept, least = (0.0, 0.0), 0, math.inf
    while True:
        before = least
        for a in first:
            sums = 2.0**a * parts[0] + parts[1] + 2.0 ** second[:, None] * parts[2] + parts[3]
            found = sums.argmin(1)
            best = int(longest[found].argmin())
            if longest[found[best]] < least:
                chosen, kept, least = (a, second[best]), int(found[best]), float(longest[found[best]])
        if before - least <= ENOUGH * least:
            return int(numbers[kept])
        around = np.arange(-FINER, FINER + 1) * (step / FINER)
        first, second, step = chosen[0] + around, chosen[1] + around, step / FINER


def _unbeaten(stages: np.ndarray) -> np.ndarray:
    """Return the numbers of the divisions that no other beats at once on the device, the link and the server.

    Whatever the weights, the least sum is that of one of them.
    """
    device, link, server = stages[0], stages[1] + stages[3], stages[2]
    kept: list[int] = []
    # By growing seconds on the device: of those before, the pairs of link and server that no other beats.
    links: list[float] = []
    servers: list[float] = []
    for number in np.lexsort((server, link, device)):
        a, c = float(link[number]), float(server[number])
        place = bisect.bisect_right(links, a)
        if place and servers[place - 1] <= c:
            continue
        end = place
        while end < len(links) and servers[end] >= c:
            end += 1
        if place and links[place - 1] == a:
            place -= 1
        links[place:end], servers[place:end] = [a], [c]
        kept.append(int(number))
    return np.array(kept)
