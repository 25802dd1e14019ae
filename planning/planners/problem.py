"""What a planner decides: the costs of every division of a network between two machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cleave.planning.graphs.layer_graph import INPUT, LayerGraph, Value
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan, Sent, Stages
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile


@dataclass(frozen=True)
class Costs:
    """What each of some divisions costs, arrays of one length.

    Attributes:
        stages: Seconds of device, uplink, server and downlink (4, N).
        delay: Seconds under way (N).
        bytes: Bytes up (N).
        tensors: Tensors up (N).
        energy: Joules of the device (N), or ``None``.
    """

    stages: np.ndarray
    delay: np.ndarray
    bytes: np.ndarray
    tensors: np.ndarray
    energy: np.ndarray | None

    @property
    def latency(self) -> np.ndarray:
        """Seconds of one task alone."""
        return self.stages.sum(0) + self.delay

    @property
    def bottleneck(self) -> np.ndarray:
        """Seconds of the longest stage."""
        return self.stages.max(0)

    def of(self, objective: str) -> np.ndarray:
        """Return what is to be made small: for ``throughput`` the longest stage.

        Raises:
            ValueError: The energy is asked for, and nothing is known of the device's power.
        """
        if objective == "energy" and self.energy is None:
            raise ValueError("the energy of the device is not known: set its power (idle, compute and send in watts)")
        found = {"latency": self.latency, "throughput": self.bottleneck, "energy": self.energy, "bytes": self.bytes}
        chosen = found[objective]
        assert chosen is not None
        return chosen


class Problem:
    """A network, a device, a link, a server and options: checked, and as numbers by layer.

    Args:
        graph: The network.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options.

    Attributes:
        device_seconds: By layer.
        server_seconds: By layer.

    Raises:
        ValueError: A profile is of another network.
    """

    def __init__(self, graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions) -> None:
        self.graph, self.device, self.link, self.server, self.options = graph, device, link, server, options
        self.device_seconds = _by_layer(graph, device.check(graph))
        self.server_seconds = _by_layer(graph, server.check(graph))

    def value_bytes(self, value: Value) -> int:
        """Return the bytes of a value on the link."""
        if value.name == INPUT:
            return self.options.image_bytes(value.count)
        return self.options.value_bytes(value.count)

    def answer_bytes(self, value: Value) -> int:
        """Return the bytes of a value that goes back as an answer."""
        return 4 * value.count if self.options.answer is None else self.options.answer

    def costs(self, members: np.ndarray) -> Costs:
        """Return what divisions cost.

        Args:
            members: bool (layers, N): what the device holds.
        """
        device, server = _sums(self.device_seconds, members), _sums(self.server_seconds, ~members)
        crossings = self.graph.crossings(members)
        up = _sums(np.array([float(self.value_bytes(value)) for value in self.graph.values]), crossings)
        tensors = crossings.sum(0)
        down = np.zeros(members.shape[1])
        for value in self.graph.values:
            if value.answer and value.layer >= 0:
                down += self.answer_bytes(value) * ~members[value.layer]
        delay = self.link.delay * (1.0 * (tensors > 0) + (down > 0))
        stages = np.stack([device, self.link.up_seconds(1) * up, server, self.link.down_seconds(1) * down])
        power = self.device.power
        energy = None if power is None else power.energy(stages[0], stages[1], stages[2] + stages[3] + delay)
        return Costs(stages, delay, up, tensors, energy)  # type: ignore[arg-type]

    def plan(self, members: np.ndarray, planner: str, why: str, *, exact: bool) -> Plan:
        """Return the plan of one division.

        Args:
            members: bool (layers,): what the device holds.
            planner: Whose it is.
            why: How it was chosen.
            exact: Whether nothing is better.
        """
        costs = self.costs(members[:, None])
        sides = self.graph.sides(members)
        bits = self.options.bits
        sent = tuple(
            Sent(value.name, self.value_bytes(value), 0 if value.name == INPUT else bits)
            for value in self.graph.sent(members)
        )
        returned = tuple(
            Sent(value.name, self.answer_bytes(value), 32)
            for value in self.graph.values
            if value.answer and value.layer >= 0 and not members[value.layer] and self.answer_bytes(value)
        )
        stages = Stages(*(float(seconds) for seconds in costs.stages[:, 0]))
        energy = None if costs.energy is None else float(costs.energy[0])
        return Plan(planner, *sides, sent, returned, stages, float(costs.delay[0]), energy, exact, why)

    def nothing(self) -> np.ndarray:
        """Return the division with nothing on the device."""
        return np.zeros(len(self.graph.layers), dtype=bool)

    def everything(self) -> np.ndarray:
        """Return the division with everything on the device."""
        return np.ones(len(self.graph.layers), dtype=bool)

    def single_cuts(self) -> np.ndarray:
        """Return the divisions that send one tensor or none, bool (layers, N), from server-only to device-only."""
        return np.concatenate([self.nothing()[:, None], self.graph.single_cuts(), self.everything()[:, None]], axis=1)


def _sums(seconds: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Sum the seconds of the members of each set, some sets at a time, as the product makes numbers of the bits."""
    starts = range(0, members.shape[1], 8192)
    return np.concatenate([seconds @ members[:, start : start + 8192] for start in starts])


def _by_layer(graph: LayerGraph, profile: Profile) -> np.ndarray:
    return np.array([math.fsum(profile.seconds[name] for name in layer.nodes) for layer in graph.layers])
