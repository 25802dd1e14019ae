"""Profiles predicted by a regression for each type of layer, fitted to measurements."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cleave.architectures import GraphNode, NodeGraph
from cleave.architectures.naming import whole_number
from cleave.planning.graphs.layer_graph import graph_digest
from cleave.planning.profiles.machine import Power
from cleave.planning.profiles.profile import Profile
from cleave.planning.profiles.roofline import bytes_moved

LEAST = 6
"""Layers of a type below which they share the regression of all that compute, or of all that only move values."""
ROUNDS = 10
"""Steps of weighing the errors by what was predicted before."""
Row = tuple[str, int, int, float]  # the type, MACs, bytes moved, seconds


@dataclass(frozen=True)
class HeldOut:
    """How well layers are predicted that were not fitted to.

    Attributes:
        median: Median of the relative errors of the layers that take at least 1 % of their network's time.
        total: Relative error of the sum over all layers, signed.
        layers: How many were held out, one fifth at a time.
    """

    median: float
    total: float
    layers: int


@dataclass(frozen=True)
class LayerRegression:
    r"""Seconds of a layer as a linear function of its work, for each type of layer.

    .. math:: t_v = \alpha_k + \beta_k \cdot \mathrm{MACs}_v + \gamma_k \cdot b_v, \qquad \alpha, \beta, \gamma \ge 0

    with the type k of the layer and the bytes b that it reads and writes; the squared errors over the predicted times
    are least. After Kang et al., "Neurosurgeon", ASPLOS 2017, section 5.1, who fit a regression to each type of layer;
    they choose the variables by type, and linear or logarithmic functions.

    Attributes:
        machine: The machine that was measured.
        coefficients: (α, β, γ) by type; ``""`` stands for all types that compute, ``"moves"`` for all that do not.
        power: What the machine draws.
    """

    machine: str
    coefficients: Mapping[str, tuple[float, float, float]]
    power: Power | None = None

    def predict(self, graph: NodeGraph) -> Profile:
        """Return the predicted profile of a network."""
        moved = bytes_moved(graph)
        seconds = {
            node.name: self.seconds(node.kind, node.macs, moved[node.name], _works(node)) for node in graph.nodes
        }
        return Profile(self.machine, graph_digest(graph), seconds, "regression", self.power)

    def seconds(self, kind: str, macs: float, moved: float, works: bool = True) -> float:
        """Return the seconds of a layer; 0 for a node that makes no tensor."""
        if not works:
            return 0.0
        fallback = "" if macs else "moves"
        chosen = next((k for k in (_key(kind, macs), fallback, "", "moves") if k in self.coefficients), None)
        if chosen is None:
            return 0.0
        constant, by_macs, by_bytes = self.coefficients[chosen]
        return constant + by_macs * macs + by_bytes * moved


def fit_regression(measured: Sequence[tuple[NodeGraph, Profile]]) -> LayerRegression:
    """Fit a regression to what was measured on one machine.

    Args:
        measured: Networks and their profiles.

    Raises:
        ValueError: There are none, they are of several machines, a profile is of another network, or holds no time.

    Example:
        >>> from torch import nn, zeros
        >>> from cleave.architectures import trace_graph
        >>> from cleave.planning import Machine, roofline
        >>> graph = trace_graph(nn.Sequential(*(nn.Linear(n, n + 64) for n in range(64, 1024, 64))), zeros(1, 64))
        >>> profile = roofline(graph, Machine("toy", rate=1e6, bandwidth=1e12, launch=1e-3))
        >>> fitted = fit_regression([(graph, profile)])
        >>> [round(abs(x), 9) for x in fitted.coefficients["Linear"]]
        [0.001, 2e-06, 0.0]
    """
    rows = _rows(measured)
    return LayerRegression(measured[0][1].machine, _fit(rows), measured[0][1].power)


def held_out_error(measured: Sequence[tuple[NodeGraph, Profile]], folds: int = 5) -> HeldOut:
    """Return how well layers are predicted by a fit to the others, each fifth of them in turn; see :class:`HeldOut`.

    Raises:
        ValueError: ``folds`` is no whole number of at least 2, or there are fewer layers; or as :func:`fit_regression`.
    """
    rows = _rows(measured)
    if whole_number("folds", folds, least=2) > len(rows):
        raise ValueError(
            f"folds={folds} are more than the {len(rows)} layers with a time; give fewer, or more networks"
        )
    machine, total = measured[0][1].machine, sum(row[3] for row in rows)
    errors, sums = [], 0.0
    for fold in range(folds):
        fitted = LayerRegression(machine, _fit([row for i, row in enumerate(rows) if i % folds != fold]))
        for kind, macs, moved, seconds in rows[fold::folds]:
            predicted = fitted.seconds(kind, macs, moved)
            sums += predicted
            if seconds >= 0.01 * total / len(measured):
                errors.append(abs(predicted / seconds - 1))
    return HeldOut(statistics.median(errors) if errors else 0.0, sums / total - 1, len(rows))


def _rows(measured: Sequence[tuple[NodeGraph, Profile]]) -> list[Row]:
    if not measured:
        raise ValueError("measured is empty; give at least one network and its measured profile")
    if len(names := {profile.machine for _, profile in measured}) > 1:
        raise ValueError(f"a regression is one of a single machine, got profiles of {', '.join(sorted(names))}")
    rows = []
    for graph, profile in measured:
        moved = bytes_moved(graph)
        seconds = profile.check(graph).seconds
        rows += [
            (node.kind, node.macs, moved[node.name], seconds[node.name])
            for node in graph.nodes
            if _works(node) and seconds[node.name] > 0
        ]
    if not rows:
        raise ValueError("every time of the profiles is 0; measure them again")
    return rows


def _fit(rows: Sequence[Row]) -> dict[str, tuple[float, float, float]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row[0], row[1]), []).append(row)
        groups.setdefault("" if row[1] else "moves", []).append(row)
    return {kind: _least_squares(own) for kind, own in groups.items() if len(own) >= LEAST or kind in ("", "moves")}


def _least_squares(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Return the coefficients, none negative, of least squares over the predicted times: the best choice of them.

    A square over what is predicted, ``(t - p)² / p``, lets short layers count beside long ones, and keeps the sum of
    all as it was measured.
    """
    values = np.array([[1.0, macs, moved, seconds] for _, macs, moved, seconds in rows])
    scale, wanted = np.maximum(values[:, :3].max(0), 1e-300), values[:, 3]
    best, least = np.zeros(3), float("inf")
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        design, predicted = (values[:, :3] / scale)[:, chosen], wanted
        for _ in range(ROUNDS):
            weights = 1 / np.sqrt(predicted)
            solution = np.linalg.lstsq(design * weights[:, None], wanted * weights, rcond=None)[0]
            predicted = np.maximum(design @ solution, 1e-3 * wanted)
        error = float(((wanted - predicted) ** 2 / predicted).sum())
        if (solution >= 0).all() and error < least:
            best, least = np.zeros(3), error
            best[list(chosen)] = solution
    first, second, third = (float(each) for each in best / scale)
    return first, second, third


def _key(kind: str, macs: float) -> str:
    return kind or ("" if macs else "moves")


def _works(node: GraphNode) -> bool:
    return node.shape is not None or node.macs > 0
