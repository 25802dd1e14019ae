"""The walk over a route: what runs in a placement once its inputs have come, and what leaves it for others."""

from __future__ import annotations

import abc
import collections
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bundle.draws import Draw
from ..bundle.edges import Crossing
from ..bundle.files import BundleError
from ..bundle.route import Route
from ..codecs.packing import CodecError
from ..naming import listed


class Message(NamedTuple):
    """What goes to a placement about one request.

    Attributes:
        rows: Which samples of the request, in order.
        payloads: What goes by each tensor's name: for a tensor that is sent, one payload for each of the rows; for the
            network's input the tensor itself.
    """

    rows: tuple[int, ...]
    payloads: dict[str, Any]


@dataclasses.dataclass
class Visit:
    """What one placement knows of one request.

    Args:
        rows: The samples that are still there; ``None`` before the first message.
        tensors: What waits for a partition, or to be sent; one row for each sample.
        state: The exit policy's, likewise.
        came: Names of what has come.
        ran: The partitions that have run.
        went: What was sent, and to which placement.
    """

    rows: tuple[int, ...] | None = None
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    came: set[str] = dataclasses.field(default_factory=set)
    ran: set[str] = dataclasses.field(default_factory=set)
    went: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the samples at some places of ``rows``; all others are dropped from whatever waits."""
        rows = self.rows or ()
        if len(places) == len(rows):
            return
        self.rows = tuple(rows[place] for place in places)
        self.tensors, self.state = taken(self.tensors, places), taken(self.state, places)


class Walk(abc.ABC):
    """The walk over the partitions of one placement: the only code that follows a route.

    Export, the parity gate, the self-test and the runtime are walks that differ in what running a partition and
    sending a tensor mean to them.

    Args:
        route: The partitions and their edges.
        placement: Whose partitions run.
        states: The parts of an exit policy's state that are sent as well.

    Attributes:
        failed: What is wrong with samples that could not be encoded or decoded, by their rows; they go no further.
    """

    def __init__(self, route: Route, placement: str, states: Sequence[Crossing] = ()) -> None:
        self.route, self.placement = route, placement
        self.parts = [part for part in route.by_name.values() if part.placement == placement]
        crossings = [*route.crossings, *states]
        self.leaving = [crossing for crossing in crossings if crossing.source == placement]
        self.coming = {crossing.tensor: crossing for crossing in crossings if crossing.target == placement}
        supplied = route.supplied
        self.takes = {part.name: [name for name in part.inputs if name not in supplied] for part in self.parts}
        self.delivers = {name: crossing.codec.delivered(name) for name, crossing in self.coming.items()}
        self.sends = {crossing.tensor: list(crossing.codec.sent(crossing.tensor).items()) for crossing in self.leaving}
        self.failed: dict[int, CodecError] = {}

    @abc.abstractmethod
    def run(self, name: str, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run a partition on its inputs and return its outputs, both by name."""

    @abc.abstractmethod
    def send(self, crossing: Crossing, tensors: dict[str, Tensor], rows: Sequence[int]) -> Any:
        """Return what goes to another placement for a tensor.

        Args:
            crossing: The tensor, and where it goes.
            tensors: Its parts by the codec's own names.
            rows: The samples that they are of. Those that cannot be encoded are added to ``failed``.
        """

    @abc.abstractmethod
    def receive(self, crossing: Crossing, payload: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return what arrives, by the codec's own names.

        Args:
            crossing: The tensor, and where it goes.
            payload: What came.
            rows: The samples that it is of. Those that cannot be decoded are added to ``failed``; any row stands for
                them in the tensors.
        """

    def draw(self, draw: Draw, rows: Sequence[int]) -> Tensor:
        """Return the numbers of a draw for some samples. Here the same for one sample always, to compare results."""
        return draw.fixed(rows)

    def have_run(self, visit: Visit, name: str, outputs: dict[str, Tensor]) -> None:
        """Do what is to be done between a partition and the next one: answer, decide who leaves. Here, nothing."""
        return

    def step(self, visit: Visit, message: Message) -> dict[str, Message]:
        """Take in what came, run each partition whose inputs are there, and return what goes to other placements.

        Raises:
            BundleError: The message holds what this placement does not take, or has already.
        """
        self._arrive(visit, message)
        for part in self.parts:
            if part.name in visit.ran or not visit.rows:
                continue
            if any(name not in visit.tensors for name in self.takes[part.name]):
                continue
            arguments = {name: self._argument(name, visit) for name in part.inputs}
            outputs = self.run(part.name, arguments)
            visit.ran.add(part.name)
            visit.tensors |= outputs
            self.have_run(visit, part.name, outputs)
            if part is not self.parts[-1]:
                self._drop_unneeded(visit)
        messages = self._messages(visit)
        self._drop_unneeded(visit)
        return messages

    def finished(self, visit: Visit) -> bool:
        """Whether nothing is left to do here for a request."""
        return not visit.rows or len(visit.ran) == len(self.parts)

    def _arrive(self, visit: Visit, message: Message) -> None:
        _check_rows(message.rows)
        tensors: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, payload in message.payloads.items():
            if name in visit.came:
                raise BundleError(f"{name} has come to {self.placement} before for this request")
            if name == self.route.input and self.placement == self.route.entry:
                if not isinstance(payload, Tensor) or not payload.ndim or payload.shape[0] != len(message.rows):
                    found = list(payload.shape) if isinstance(payload, Tensor) else type(payload).__name__
                    raise BundleError(f"{name} must be a tensor of {len(message.rows)} samples, got {found}")
                tensors[name] = payload
                continue
            if name not in self.coming:
                known = [*([self.route.input] if self.placement == self.route.entry else ()), *self.coming]
                raise BundleError(f"nothing on {self.placement} takes {name}; it takes {listed(known)}")
            crossing = self.coming[name]
            # Between walks that send no bytes a payload is the tensors themselves.
            if not isinstance(payload, Mapping | list | tuple):
                raise BundleError(f"{name} must come as a list of payloads, got {type(payload).__name__}")
            if not isinstance(payload, Mapping) and len(payload) != len(message.rows):
                raise BundleError(f"{name} has {len(payload)} payloads for {len(message.rows)} samples")
            delivered = self.receive(crossing, payload, message.rows)
            if crossing.state is not None:
                state[crossing.state] = delivered[crossing.codec.delivers[0]]
            else:
                names = self.delivers[name]
                tensors |= {names[own]: value for own, value in delivered.items()}
        visit.came |= message.payloads.keys()
        for name in self.route.supplied:
            tensors.pop(name, None)
        if visit.rows is None or visit.rows == message.rows:
            visit.rows = message.rows
            if not self.failed:
                visit.tensors |= tensors
                visit.state |= state
                return
        stay = set(visit.rows) & set(message.rows) - self.failed.keys()
        visit.keep([place for place, row in enumerate(visit.rows) if row in stay])
        places = [place for place, row in enumerate(message.rows) if row in stay]
        if len(places) < len(message.rows):
            tensors, state = taken(tensors, places), taken(state, places)
        visit.tensors |= tensors
        visit.state |= state

    def _argument(self, name: str, visit: Visit) -> Tensor:
        if name in visit.tensors:
            return visit.tensors[name]
        if name in self.route.settings:
            return self.route.settings[name]
        return self.draw(self.route.drawn[name], visit.rows or ())

    def _messages(self, visit: Visit) -> dict[str, Message]:
        messages: dict[str, Message] = {}
        due = [
            crossing
            for crossing in self.leaving
            if crossing.producer in visit.ran and (crossing.tensor, crossing.target) not in visit.went
        ]
        for crossing in due if visit.rows else ():
            payload = self.send(crossing, self._sent(visit, crossing), visit.rows or ())
            message = messages.setdefault(crossing.target, Message(visit.rows or (), {}))
            message.payloads[crossing.tensor] = payload
        if failed := self.failed.keys() & set(visit.rows or ()):
            # What was encoded of the others has rows for these, so all is encoded again without them.
            visit.keep([place for place, row in enumerate(visit.rows or ()) if row not in failed])
            return self._messages(visit)
        visit.went |= {(crossing.tensor, crossing.target) for crossing in due if visit.rows}
        return messages

    def _sent(self, visit: Visit, crossing: Crossing) -> dict[str, Tensor]:
        """Return what is sent of a tensor, by the codec's own names."""
        if crossing.state is None:
            return {own: visit.tensors[name] for own, name in self.sends[crossing.tensor]}
        value = visit.state[crossing.state].to(torch.float32)
        return {crossing.codec.sends[0]: value.reshape(len(value), *crossing.codec.shape)}

    def _drop_unneeded(self, visit: Visit) -> None:
        """Forget what no partition waits for and what has been sent."""
        if self.finished(visit) and len(visit.went) == len(self.leaving):
            visit.tensors = {}
            return
        needed = {name for part in self.parts if part.name not in visit.ran for name in self.takes[part.name]}
        for crossing in self.leaving:
            if (crossing.tensor, crossing.target) not in visit.went:
                needed.update(name for _, name in self.sends[crossing.tensor])
        visit.tensors = {name: tensor for name, tensor in visit.tensors.items() if name in needed}


def _check_rows(rows: Any) -> None:
    """Raise :class:`BundleError` unless rows are whole numbers from 0 that rise."""
    whole = isinstance(rows, tuple | list) and set(map(type, rows)) <= {int}
    if not whole or (rows and rows[0] < 0) or not all(map(operator.lt, rows, rows[1:])):
        raise BundleError(f"rows must rise, each sample once, whole numbers from 0, got {str(rows)[:80]}")


def follow(steps: Mapping[str, Callable[[Message], dict[str, Message]]], entry: str, message: Message) -> None:
    """Bring a message to a placement, and what leaves it to the others, until nothing goes anywhere any more.

    Args:
        steps: What each placement does with a message; returns what goes to others.
        entry: The placement where a request begins.
        message: Its input.
    """
    waiting = collections.deque([(entry, message)])
    while waiting:
        placement, arrived = waiting.popleft()
        waiting.extend(steps[placement](arrived).items())


def walk_all(walks: Mapping[str, Walk], route: Route, inputs: Tensor) -> None:
    """Walk over a whole route, every placement in turn."""
    visits = {placement: Visit() for placement in walks}

    def step(placement: str) -> Callable[[Message], dict[str, Message]]:
        return lambda message: walks[placement].step(visits[placement], message)

    message = Message(tuple(range(len(inputs))), {route.input: inputs})
    follow({placement: step(placement) for placement in walks}, route.entry, message)


def taken(tensors: Mapping[str, Tensor], places: Sequence[int]) -> dict[str, Tensor]:
    """Return some rows of each tensor."""
    rows = torch.tensor(places, dtype=torch.int64)
    return {name: tensor[rows.to(tensor.device)] for name, tensor in tensors.items()}
