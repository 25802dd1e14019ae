"""A stream of tasks through device, uplink, server and downlink."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from cleave.architectures.naming import did_you_mean, whole_number
from cleave.planning.planners.plan import STAGES
from cleave.planning.profiles.checks import not_negative
from cleave.planning.profiles.link import Link
from cleave.planning.simulation.report import Simulation, Span
from cleave.planning.simulation.work import DOWNLINK, UPLINK, Operation, Task

FINISH, DELIVER, ARRIVE = range(3)


def simulate(tasks: Sequence[Task], link: Link, queues: Mapping[str, int] | None = None) -> Simulation:
    """Let tasks pass through the four stations.

    A station is one machine and works on one operation at a time, to its end. When it is free it takes, of the
    operations whose inputs are there, the first of the earliest task. A message is under way for half the link's round
    trip, in which nobody is busy.

    A task waits at a station from when it could begin there until it does. Where the queue is bounded and full, the
    station before keeps what it has done and stands still; a new task is turned away.

    Args:
        tasks: In the order in which they come.
        link: What lies between; a trace must last until the last transfer is done.
        queues: The most tasks that wait at a station, by its name: device, uplink, server, downlink; without bound
            where it is not named.

    Raises:
        ValueError: There are no tasks, they do not come in order, a queue is unknown or negative, or the link's trace
            ends before the stream.

    Example:
        >>> from cleave.planning.simulation.work import stage_work
        >>> tasks = [Task(time, stage_work((1.0, 4.0, 1.0))) for time in (0.0, 2.0, 4.0, 6.0)]
        >>> simulate(tasks, Link(up=1.0)).done
        (6.0, 10.0, 14.0, 18.0)
    """
    _check(tasks, queues or {})
    return _Run(tasks, link, [(queues or {}).get(name) for name in STAGES]).result()


class _Run:
    """The state of the stations while time passes."""

    def __init__(self, tasks: Sequence[Task], link: Link, queues: Sequence[int | None]) -> None:
        self.tasks, self.link, self.queues = tasks, link, queues
        self.events: list[tuple[float, int, int, int]] = []
        # Of each operation's inputs, those that are not there, and those that have not left the station before.
        self.missing = [[len(each.needs) for each in task.work.operations] for task in tasks]
        self.pending = [list(missing) for missing in self.missing]
        self.users = [_users(task) for task in tasks]
        self.left = [len(task.work.operations) for task in tasks]
        self.ready: list[list[tuple[int, int]]] = [[] for _ in STAGES]
        self.busy = [False] * len(STAGES)
        self.entered: list[set[int]] = [set() for _ in STAGES]  # tasks that have a place at a station
        self.waiting: list[set[int]] = [set() for _ in STAGES]  # those of them that have not begun there
        self.blocked: list[tuple[float, int, int]] = []  # since when, task, operation that is done and kept
        self.blocked_seconds = [0.0] * len(STAGES)
        self.spans: list[Span] = []
        self.done = [math.nan] * len(tasks)
        self.sent = [0, 0]
        for number, task in enumerate(tasks):
            self.at(task.arrival, ARRIVE, number, 0)

    def at(self, time: float, kind: int, task: int, operation: int) -> None:
        heapq.heappush(self.events, (time, kind, task, operation))

    def result(self) -> Simulation:
        while self.events:
            now = self.events[0][0]
            # What is done at one time is known before any station chooses; then tasks come, one by one.
            while self.events and self.events[0][:2] in ((now, FINISH), (now, DELIVER)):
                _, kind, task, operation = heapq.heappop(self.events)
                (self.finish, self.deliver)[kind](now, task, operation)
            self.settle(now)
            while self.events and self.events[0][:2] == (now, ARRIVE):
                self.arrive(now, heapq.heappop(self.events)[2])
                self.settle(now)
        arrivals = tuple(task.arrival for task in self.tasks)
        blocked = tuple(self.blocked_seconds)
        return Simulation(arrivals, tuple(self.done), tuple(self.spans), blocked, *self.sent)  # type: ignore[arg-type]

    def operation(self, task: int, number: int) -> Operation:
        return self.tasks[task].work.operations[number]

    def arrive(self, now: float, task: int) -> None:
        operations = self.tasks[task].work.operations
        if not operations:
            self.done[task] = now
            return
        first = [number for number, missing in enumerate(self.missing[task]) if not missing]
        stations = {operations[number].station for number in first}
        if not all(self.has_room(station) for station in stations):
            return  # turned away
        for station in stations:
            self.enter(station, task)
        for number in first:
            heapq.heappush(self.ready[operations[number].station], (task, number))

    def finish(self, now: float, task: int, number: int) -> None:
        if not self.hand_on(now, task, number):
            self.blocked.append((now, task, number))

    def hand_on(self, now: float, task: int, number: int) -> bool:
        """Free the station of an operation that is done, unless where the task goes next is no room."""
        own = self.operation(task, number).station
        following = [user for user in self.users[task][number] if self.pending[task][user] == 1]
        new = {self.operation(task, user).station for user in following} - {own}
        new = {station for station in new if task not in self.entered[station]}
        if not all(self.has_room(station) for station in new):
            return False
        for station in new:
            self.enter(station, task)
        for user in self.users[task][number]:
            self.pending[task][user] -= 1
        self.busy[own] = False
        on_the_way = self.link.delay if own in (UPLINK, DOWNLINK) else 0.0
        if on_the_way:
            self.at(now + on_the_way, DELIVER, task, number)
        else:
            self.deliver(now, task, number)
        return True

    def deliver(self, now: float, task: int, number: int) -> None:
        for user in self.users[task][number]:
            self.missing[task][user] -= 1
            if not self.missing[task][user]:
                heapq.heappush(self.ready[self.operation(task, user).station], (task, user))
        self.left[task] -= 1
        if not self.left[task]:
            self.done[task] = now

    def has_room(self, station: int) -> bool:
        bound = self.queues[station]
        unused = not self.busy[station] and not self.waiting[station]
        return bound is None or len(self.waiting[station]) < bound or unused

    def enter(self, station: int, task: int) -> None:
        self.entered[station].add(task)
        self.waiting[station].add(task)

    def settle(self, now: float) -> None:
        """Let every free station begin, and hand on what was kept, until nothing changes."""
        changed = True
        while changed:
            changed = False
            for station in range(len(STAGES)):
                changed = self.begin(now, station) or changed
            for kept in sorted(self.blocked):
                since, task, number = kept
                if self.hand_on(now, task, number):
                    self.blocked.remove(kept)
                    self.blocked_seconds[self.operation(task, number).station] += now - since
                    changed = True

    def begin(self, now: float, station: int) -> bool:
        if self.busy[station] or not self.ready[station]:
            return False
        task, number = heapq.heappop(self.ready[station])
        each = self.operation(task, number)
        self.waiting[station].discard(task)
        if each.station in (UPLINK, DOWNLINK):
            self.sent[each.station == DOWNLINK] += each.bytes
        if each.seconds is not None:
            end = now + each.seconds
        else:
            end = self.link.up_end(now, each.bytes) if station == UPLINK else now + self.link.down_seconds(each.bytes)
        self.busy[station] = True
        self.spans.append(Span(station, task, each.name, now, end))
        self.at(end, FINISH, task, number)
        return True


def _users(task: Task) -> list[list[int]]:
    users: list[list[int]] = [[] for _ in task.work.operations]
    for number, each in enumerate(task.work.operations):
        for before in each.needs:
            users[before].append(number)
    return users


def _check(tasks: Sequence[Task], queues: Mapping[str, int]) -> None:
    if not tasks:
        raise ValueError("tasks is empty; give at least one task")
    for before, task in zip([None, *tasks], tasks, strict=False):
        not_negative("the arrival of a task", task.arrival, "seconds")
        if before is not None and task.arrival < before.arrival:
            raise ValueError(f"tasks must come in order: one at {task.arrival:g} s follows one at {before.arrival:g} s")
    for name, bound in queues.items():
        if name not in STAGES:
            raise ValueError(
                f"queues: no station is called {name!r}; they are {', '.join(STAGES)}.{did_you_mean(name, STAGES)}"
            )
        whole_number(f"queues.{name}", bound, least=0)
