"""What a task asks of device, uplink, server and downlink, and in which order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cleave.architectures.naming import did_you_mean, whole_number
from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.planners.plan import STAGES, Plan
from cleave.planning.profiles.checks import not_negative
from cleave.planning.profiles.profile import Profile

DEVICE, UPLINK, SERVER, DOWNLINK = range(4)


@dataclass(frozen=True)
class Operation:
    """A step of a task on one station.

    Attributes:
        name: The layer that is computed, or the tensor that is sent.
        station: Number of the station in ``STAGES``: device, uplink, server, downlink.
        seconds: How long it takes; ``None`` where the link says so.
        bytes: What is sent.
        needs: Numbers of the earlier operations of the task that must be done.
    """

    name: str
    station: int
    seconds: float | None
    bytes: int = 0
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Work:
    """The operations of a task, each behind those that it needs.

    Attributes:
        operations: In the order in which a station prefers them.

    Raises:
        ValueError: An operation needs a later one, takes a negative time or sends a negative size, or has no such
            station.
    """

    operations: tuple[Operation, ...]

    def __post_init__(self) -> None:
        for number, each in enumerate(self.operations):
            if each.station not in range(len(STAGES)):
                raise ValueError(
                    f"operation {number} ({each.name}) has no station {each.station!r}; "
                    f"0 to {len(STAGES) - 1} are {', '.join(STAGES)}"
                )
            if each.seconds is None and each.station in (DEVICE, SERVER):
                raise ValueError(
                    f"operation {number} ({each.name}) must say its seconds: no link tells those of a machine"
                )
            whole_number(f"the bytes of {each.name!r}", each.bytes, least=0)
            if any(not 0 <= before < number for before in each.needs):
                raise ValueError(f"operation {number} ({each.name}) must need earlier ones only, got {each.needs}")
            if each.seconds is not None:
                not_negative(f"the time of {each.name!r}", each.seconds, "seconds")

    def in_stages(self) -> Work:
        """Return the work with one operation a station, each behind the last: no station begins before the one before.

        This is what planners reckon with: their latency is the sum of the stages.
        """
        found: list[Operation] = []
        for station, name in enumerate(STAGES):
            own = [each for each in self.operations if each.station == station]
            if own:
                known = [each.seconds for each in own if each.seconds is not None]
                seconds = math.fsum(known) if len(known) == len(own) else None
                needs = (len(found) - 1,) if found else ()
                found.append(Operation(name, station, seconds, sum(each.bytes for each in own), needs))
        return Work(tuple(found))

    def until(self, name: str, head: float = 0.0) -> Work:
        """Return the work of a task that leaves behind an operation, by an exit there.

        Args:
            name: The operation that the exit stands behind.
            head: Seconds of the exit itself, on the same station.

        Raises:
            ValueError: There is no such operation.
        """
        names = [each.name for each in self.operations if each.station in (DEVICE, SERVER)]
        if name not in names:
            raise ValueError(f"no operation is called {name!r}.{did_you_mean(name, names)}")
        here = next(i for i, e in enumerate(self.operations) if e.name == name and e.station in (DEVICE, SERVER))
        kept, todo = set[int](), [here]
        while todo:
            if (number := todo.pop()) not in kept:
                kept.add(number)
                todo += self.operations[number].needs
        place = {number: i for i, number in enumerate(sorted(kept))}
        found = [
            dataclasses.replace(self.operations[number], needs=tuple(place[n] for n in self.operations[number].needs))
            for number in sorted(kept)
        ]
        found.append(Operation(f"exit at {name}", self.operations[here].station, head, needs=(place[here],)))
        if self.operations[here].station == SERVER:
            back = [each for each in self.operations if each.station == DOWNLINK]
            found += [dataclasses.replace(each, needs=(len(found) - 1,)) for each in back[:1]]
        return Work(tuple(found))


@dataclass(frozen=True)
class Task:
    """A task: when it comes, and what it asks for.

    Attributes:
        arrival: Seconds.
        work: Its operations.
    """

    arrival: float
    work: Work


def stage_work(seconds: Sequence[float], sizes: tuple[int, int] = (0, 0)) -> Work:
    """Return the work of a task with one operation a station.

    Args:
        seconds: Of device, uplink, server and, where there is one, downlink; a stage of 0 seconds is left out.
        sizes: Bytes up and back, for the count alone.

    Raises:
        ValueError: There are more than four stages, or one of them is negative.
    """
    if len(seconds) > len(STAGES):
        raise ValueError(f"seconds are those of at most {len(STAGES)} stages, {', '.join(STAGES)}; got {list(seconds)}")
    found: list[Operation] = []
    for station, value in enumerate(seconds):
        if value:
            size = {UPLINK: sizes[0], DOWNLINK: sizes[1]}.get(station, 0)
            needs = (len(found) - 1,) if found else ()
            found.append(Operation(STAGES[station], station, value, size, needs))
    return Work(tuple(found))


def plan_work(graph: LayerGraph, plan: Plan, device: Profile, server: Profile) -> Work:
    """Return the work of a task under a plan, by its real dependencies.

    A tensor is sent once it is made, and a layer runs on the server once its inputs are there, so that device, link and
    server work on one task at a time each at its part of it.

    Args:
        graph: The network that was planned.
        plan: Its plan.
        device: Seconds of its nodes on the device.
        server: Seconds of its nodes on the server.

    Raises:
        ValueError: A profile is of another network.
    """
    device.check(graph)
    server.check(graph)
    held = set(plan.device_nodes)
    here = [layer.nodes[0] in held for layer in graph.layers]
    found: list[Operation] = []
    computed: dict[int, int] = {}
    arrived: dict[str, int] = {}
    sizes = {each.name: each.bytes for each in plan.sent}
    read: dict[int, list[str]] = {}
    for value in graph.values:
        for reader in value.readers:
            read.setdefault(reader, []).append(value.name)

    def compute(number: int, profile: Profile, station: int) -> None:
        layer = graph.layers[number]
        needs = {computed[before] for before in layer.needs if here[before] == here[number]}
        needs |= {arrived[name] for name in read.get(number, ()) if name in arrived and station == SERVER}
        seconds = math.fsum(profile.seconds[name] for name in layer.nodes)
        computed[number] = len(found)
        found.append(Operation(layer.name, station, seconds, needs=tuple(sorted(needs))))

    for number in range(len(here)):
        if here[number]:
            compute(number, device, DEVICE)
    for value in graph.values:
        if value.name in sizes:
            arrived[value.name] = len(found)
            made = (computed[value.layer],) if value.layer >= 0 else ()
            found.append(Operation(value.name, UPLINK, None, sizes[value.name], made))
    for number in range(len(here)):
        if not here[number]:
            compute(number, server, SERVER)
    layer_of = {value.name: value.layer for value in graph.values}
    for each in plan.returned:
        found.append(Operation(each.name, DOWNLINK, None, each.bytes, (computed[layer_of[each.name]],)))
    return Work(tuple(found))
