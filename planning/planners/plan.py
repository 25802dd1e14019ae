"""The one result of every planner: what runs where, what is sent, and how long it takes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cleave.deployment.bundle.canonical_json import dump

STAGES = ("device", "uplink", "server", "downlink")


class Sent(NamedTuple):
    """A tensor that is sent.

    Attributes:
        name: The node that makes it; ``input`` for the images.
        bytes: Bytes on the link.
        bits: Bits of each number; 0 where an image codec or a trained codec decides.
    """

    name: str
    bytes: int
    bits: int


class Stages(NamedTuple):
    """Busy seconds of the four stations for one task.

    Attributes:
        device: T_e, of computing on the device.
        uplink: T_t, of sending.
        server: T_c, of computing on the server.
        downlink: T_r, of sending the answer back.
    """

    device: float
    uplink: float
    server: float
    downlink: float


@dataclass(frozen=True)
class Plan:
    """A division of a network between a device and a server, and what it comes to.

    Attributes:
        planner: Whose it is.
        device_nodes: Nodes on the device, in order.
        server_nodes: Nodes on the server, in order.
        sent: Tensors that go up; each once, however many nodes read it.
        returned: Outputs that come back.
        stages: Busy seconds of device, uplink, server and downlink for one task.
        delay: Seconds under way, there and back: part of the latency that keeps no station busy.
        energy: Joules of the device for one task, ``None`` where nothing is known of its power.
        exact: Whether it is proven that no plan is better in what the planner optimises.
        why: How it was chosen, in a sentence.
        schedule: The plans of several jobs in their order, where the planner mixes cuts; empty otherwise.
        makespan: Seconds until the last of them is done.
        accuracy: Share of right answers, of a trained network; ``None`` where the network answers as it did.
    """

    planner: str
    device_nodes: tuple[str, ...]
    server_nodes: tuple[str, ...]
    sent: tuple[Sent, ...]
    returned: tuple[Sent, ...]
    stages: Stages
    delay: float
    energy: float | None
    exact: bool
    why: str
    schedule: tuple[Plan, ...] = ()
    makespan: float | None = None
    accuracy: float | None = None

    @property
    def latency(self) -> float:
        """Seconds of one task alone, T_e + T_t + T_c + T_r and the delay, one stage after the other."""
        return math.fsum(self.stages) + self.delay

    @property
    def bottleneck(self) -> float:
        """Seconds of the longest stage, which a stream waits for."""
        return max(self.stages)

    @property
    def bottleneck_stage(self) -> str:
        """Name of the longest stage."""
        return STAGES[self.stages.index(self.bottleneck)]

    @property
    def throughput(self) -> float:
        """Tasks per second of an endless stream; of a schedule, its jobs over its makespan."""
        if self.schedule and self.makespan:
            return len(self.schedule) / self.makespan
        return 1 / self.bottleneck if self.bottleneck else math.inf

    @property
    def bubbles(self) -> float:
        """Idle seconds of device, uplink and server for each task of an endless stream, where they have work at all."""
        used = [seconds for seconds in self.stages[:3] if seconds > 0]
        return math.fsum(self.bottleneck - seconds for seconds in used)

    @property
    def bytes(self) -> int:
        """Bytes that go up for one task."""
        return sum(each.bytes for each in self.sent)

    @property
    def tensors(self) -> int:
        """How many tensors go up."""
        return len(self.sent)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, with what follows from it."""
        values = dataclasses.asdict(self)
        values["sent"] = [each._asdict() for each in self.sent]
        values["returned"] = [each._asdict() for each in self.returned]
        values["stages"] = self.stages._asdict()
        values["schedule"] = [{"sent": [s.name for s in one.sent], "stages": one.stages} for one in self.schedule]
        follows = ("latency", "bottleneck", "bottleneck_stage", "throughput", "bubbles", "bytes")
        values |= {name: getattr(self, name) for name in follows}
        # JSON has no infinity: null is the throughput where nothing takes any time.
        return values | ({} if math.isfinite(self.throughput) else {"throughput": None})


def write_plan(file: Path | str, plan: Plan, **more: Any) -> None:
    """Write a plan as JSON.

    Args:
        file: The file.
        plan: The plan.
        **more: What it is a plan of, as JSON values: the network and its graph's digest, machines, a link.
    """
    Path(file).write_bytes(dump({**more, **plan.to_dict()}))
