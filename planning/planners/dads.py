"""DADS: minimum cuts of a network's graph, for a lightly and for a heavily loaded system."""

from __future__ import annotations

import dataclasses

from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.graphs.min_cut import min_cut
from cleave.planning.planners.additive import additive
from cleave.planning.planners.optimum import optimum
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan
from cleave.planning.planners.problem import Problem
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile


def dads_light(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> Plan:
    r"""Minimise the latency of one task by a minimum cut.

    .. math:: \min_S \; T_e(S) + T_t(S) + T_c(S)

    over all closed sets S, several tensors included. After Hu, Bao, Wang and Liu, "Dynamic Adaptive DNN Surgery for
    Inference Acceleration on the Edge", INFOCOM 2019, section IV (DSL). A value that several nodes read is sent once,
    the images are on the device, and no edge leads back from the server.

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
    r"""Make the longest stage short by an approximation; arguments as of :func:`dads_light`.

    .. math:: \min_S \max\{T_e(S), T_t(S), T_c(S)\} \quad\text{(NP-hard)}

    The paper's DSH promises at most three times the optimum. That is what the minimum cut of the sum keeps: with the
    best S* of the maximum, max(S) ≤ sum(S) ≤ sum(S*) ≤ 3 max(S*). This is that cut, or device-only or server-only where
    one of them is better. The abstract of INFOCOM 2019 states the ratio; the steps are ours.

    ``why`` tells the gap to the true optimum, where the closed sets can be enumerated.
    """
    problem = Problem(graph, device, link, server, options)
    found = [min_cut(graph, additive(problem)), problem.everything(), problem.nothing()]
    members = min(found, key=lambda each: float(problem.costs(each[:, None]).bottleneck[0]))
    plan = problem.plan(members, "dads_heavy", "", exact=False)
    best = optimum(graph, device, link, server, dataclasses.replace(options, objective="throughput", exact=False))
    if not best.exact:
        return dataclasses.replace(plan, why="at most 3 times the least longest stage; how far from it is not known")
    ratio = plan.bottleneck / best.bottleneck if best.bottleneck else 1.0
    return dataclasses.replace(plan, why=f"at most 3 times the least longest stage; here {ratio:.3f} times it")
