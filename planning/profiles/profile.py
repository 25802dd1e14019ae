"""Profiles: seconds of every node of one network on one machine, as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cleave.architectures import NodeGraph
from cleave.architectures.naming import did_you_mean, whole_number
from cleave.deployment.bundle.canonical_json import dump, parse
from cleave.planning.graphs.layer_graph import LayerGraph, graph_digest
from cleave.planning.profiles.checks import file_there, not_negative, of_type, positive
from cleave.planning.profiles.machine import Power

SCHEMA = 1
How = Literal["roofline", "regression", "measured", "given"]


@dataclass(frozen=True)
class Profile:
    """Seconds per image of every node of a network on a machine.

    Attributes:
        machine: The machine's name.
        digest: SHA-256 of the network's graph, see :func:`graph_digest`; of another network or input size the profile
            is refused.
        seconds: Of each node by its name.
        how: Where they come from: ``roofline``, ``regression``, ``measured`` or ``given``.
        power: What the machine draws, for the energy of a device.
        threads: Threads that were measured with.
        batch: Images at once that were measured with.
        whole: Seconds per image of the whole network, measured at once: nodes in isolation miss what is fused between
            them, and pay for being started one by one.

    Raises:
        ValueError: A time is negative or no number, or another value is not what it should be.
    """

    machine: str
    digest: str
    seconds: Mapping[str, float]
    how: How = "given"
    power: Power | None = None
    threads: int | None = None
    batch: int = 1
    whole: float | None = None

    def __post_init__(self) -> None:
        of_type("machine", self.machine, str, "a text, what the machine is called")
        of_type("digest", self.digest, str, "the SHA-256 of a graph", of=self.machine)
        of_type("seconds", self.seconds, Mapping, "the seconds of each node by its name", of=self.machine)
        for name, seconds in self.seconds.items():
            not_negative(f"the time of {name!r}", seconds, "seconds", of=self.machine)
        whole_number("batch", self.batch)
        if self.threads is not None:
            whole_number("threads", self.threads)
        if self.whole is not None:
            not_negative("whole", self.whole, "seconds of the whole network", of=self.machine)
        if self.power is not None:
            of_type(
                "power", self.power, Power, "a Power with idle, compute and send in watts, or None", of=self.machine
            )
        if self.how not in ("roofline", "regression", "measured", "given"):
            raise ValueError(f"how must be roofline, regression, measured or given; got {self.how!r}")

    @property
    def total(self) -> float:
        """Seconds of all nodes one after the other."""
        return math.fsum(self.seconds.values())

    def check(self, graph: LayerGraph | NodeGraph) -> Profile:
        """Return the profile if it is one of this network.

        Raises:
            ValueError: It is of another network or input size, or misses a node.
        """
        own = graph.digest if isinstance(graph, LayerGraph) else graph_digest(graph)
        nodes = graph.nodes if isinstance(graph, NodeGraph) else graph.nodes.nodes
        if self.digest != own:
            missing = [node.name for node in nodes if node.name not in self.seconds]
            why = f"it has no {missing[0]!r}" if missing else "its layers have other sizes, as for another image size"
            raise ValueError(
                f"the profile of {self.machine} is of another network or input size: {why} (its graph is "
                f"{self.digest[:12]}…, this one {own[:12]}…); make it again for this network and input size"
            )
        if missing := [node.name for node in nodes if node.name not in self.seconds]:
            near = did_you_mean(missing[0], self.seconds)
            raise ValueError(f"the profile of {self.machine} misses the seconds of {missing[0]!r}.{near}")
        return self

    def scaled(self, factor: float) -> Profile:
        """Return the profile of a machine that takes ``factor`` times as long; ValueError where that is not above 0."""
        positive("factor", factor, "how many times as long it takes")
        seconds = {name: factor * value for name, value in self.seconds.items()}
        return dataclasses.replace(self, seconds=seconds, whole=None if self.whole is None else factor * self.whole)


def write_profile(file: Path | str, profile: Profile) -> None:
    """Write a profile as :func:`read_profile` reads it."""
    Path(file).write_bytes(dump({"schema": SCHEMA, **dataclasses.asdict(profile), "seconds": dict(profile.seconds)}))


def read_profile(file: Path | str) -> Profile:
    """Read a profile.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or no profile, or holds a time or a power that is none.
    """
    file = file_there(file, "a profile")
    try:
        values = parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    known = {field.name for field in dataclasses.fields(Profile)}
    if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA or set(values) != known:
        raise ValueError(f"{file} is no profile of schema {SCHEMA}; measure it again, or write it by write_profile")
    try:
        if not isinstance(values["seconds"], dict):
            raise ValueError(f"seconds must be an object of seconds by node, got {values['seconds']!r:.100}")
        values["power"] = _power(values["power"])
        return Profile(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _power(values: Any) -> Power | None:
    if values is None:
        return None
    if not isinstance(values, dict) or set(values) != {"idle", "compute", "send"}:
        raise ValueError(f"power must be an object of idle, compute and send, or null; got {values!r:.100}")
    return Power(**values)
