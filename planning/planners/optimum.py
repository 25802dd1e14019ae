"""The best plan there is: by looking at every closed set, and beyond a limit by a minimum cut."""

from __future__ import annotations

import numpy as np

from cleave.planning.graphs.closed_sets import TooManySetsError
from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.graphs.min_cut import min_cut
from cleave.planning.planners.additive import additive
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan
from cleave.planning.planners.problem import Costs, Problem
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile

WEIGHTS = (0.1, 1.0, 10.0)  # of sending, or of the device's work, in the sums whose minimum cuts are looked at


def optimum(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> Plan:
    r"""Return the best plan for ``options.objective``.

    .. math:: \min_{S \text{ closed}} L(S), \quad \max_i T_i(S), \quad E(S) \quad\text{or}\quad b(S)

    Every closed set is looked at where there are at most ``options.limit``; it is the reference for every published
    planner. Beyond, latency, energy and bytes add up over layers and values, so that a minimum cut finds their optimum
    (Hu, Bao, Wang and Liu, "Dynamic Adaptive DNN Surgery for Inference Acceleration on the Edge", INFOCOM 2019, section
    III-B). The least bottleneck stage does not: it is then the best of all cuts in the order of execution, of single
    tensors and of weighted minimum cuts, which may not be optimal, and the plan says so.

    Args:
        graph: The network, see :func:`layer_graph`.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options.

    Raises:
        TooManySetsError: There are more closed sets than the limit, and ``options.exact`` asks for all.
        ValueError: A profile is of another network, or nothing is known of the device's power for its energy.
    """
    problem = Problem(graph, device, link, server, options)
    return _best(problem, enumerated(problem), options.objective)


def enumerated(problem: Problem) -> tuple[np.ndarray, Costs] | None:
    """Return all closed sets with what they cost; ``None`` where there are too many to look at each."""
    try:
        sets = problem.graph.closed_sets(problem.options.limit)
    except TooManySetsError as error:
        if problem.options.exact:
            raise TooManySetsError(f"exact=true asks for every one, but {error}; or raise the limit") from None
        return None
    return sets, problem.costs(sets)


def _best(problem: Problem, known: tuple[np.ndarray, Costs] | None, objective: str) -> Plan:
    name = f"optimum ({objective})"
    if known is None:
        return _without_enumeration(problem, name, objective)
    sets, costs = known
    # Of equally good ones the one of least latency, such as among all that send nothing.
    best = int(np.lexsort((costs.latency, costs.of(objective)))[0])
    return problem.plan(sets[:, best], name, f"the best of all {sets.shape[1]:,} closed sets", exact=True)


def _without_enumeration(problem: Problem, name: str, objective: str) -> Plan:
    limit = problem.options.limit
    if objective != "throughput":
        members = min_cut(problem.graph, additive(problem, objective))
        why = f"a minimum cut, which is exact for {objective}; there are more than {limit:,} closed sets"
        return problem.plan(members, name, why, exact=True)
    sets = candidate_sets(problem)
    costs = problem.costs(sets)
    best = int(np.lexsort((costs.latency, costs.bottleneck))[0])
    why = f"the best of {sets.shape[1]:,} cuts that were looked at, of more than {limit:,}: it may not be optimal"
    return problem.plan(sets[:, best], name, why, exact=False)


def candidate_sets(problem: Problem) -> np.ndarray:
    """Return divisions worth a look where there are too many for all, bool (layers, N)."""
    count = len(problem.graph.layers)
    prefixes = np.triu(np.ones((count, count + 1), dtype=bool), 1)
    cuts = [min_cut(problem.graph, additive(problem, "latency", sending=weight)) for weight in WEIGHTS]
    cuts += [min_cut(problem.graph, additive(problem, "latency", device=weight)) for weight in WEIGHTS if weight != 1]
    return np.concatenate([prefixes, problem.single_cuts(), np.stack(cuts, axis=1)], axis=1)


def optima(graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> dict[str, Plan]:
    """Return the optimum of each objective that can be told, by its name; arguments as of :func:`optimum`."""
    names = [name for name in ("latency", "throughput", "energy", "bytes") if name != "energy" or device.power]
    problem = Problem(graph, device, link, server, options)
    known = enumerated(problem)
    return {name: _best(problem, known, name) for name in names}
