"""The route of a bundle: a graph of partitions and of the tensors that pass between them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..codecs.codec import Codec
from ..codecs.packing import CodecError
from ..naming import did_you_mean
from .edges import Crossing, Edge, Signature, Transfer, repeated
from .files import BundleError


@dataclasses.dataclass(frozen=True)
class Route:
    """Partitions and the edges between them, checked: a graph without cycles in which nothing is missing.

    Args:
        partitions: What runs, in any order.
        edges: What passes between them.
        input: Name of the network's input, which the partitions of one placement take.
        results: Outputs that nobody need take: the network's own, and the logits of exits.

    Raises:
        BundleError: A name appears twice or is unknown, the edges form a cycle, a partition takes what nothing gives or
            emits what nobody takes, or a codec does not fit the placements.
    """

    partitions: tuple[Signature, ...]
    edges: tuple[Edge, ...]
    input: str
    results: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_partitions(self)
        _ = self.order  # refuses a cycle
        _check_names(self)
        _check_edges(self)
        _check_inputs(self)
        _check_outputs(self)

    @functools.cached_property
    def order(self) -> tuple[str, ...]:
        """Names of the partitions, each behind all those it takes something of, else as they are listed."""
        before = {part.name: {e.producer for e in self.edges if e.consumer == part.name} for part in self.partitions}
        order: list[str] = []
        while before:
            ready = next((name for name, needs in before.items() if needs.isdisjoint(before)), None)
            if ready is None:
                raise BundleError(f"the route has a cycle: {' > '.join(_cycle(before))}; a tensor must come first")
            order.append(ready)
            del before[ready]
        return tuple(order)

    @functools.cached_property
    def by_name(self) -> dict[str, Signature]:
        """The partitions by name, in the order in which they run."""
        known = {part.name: part for part in self.partitions}
        return {name: known[name] for name in self.order}

    @property
    def placements(self) -> tuple[str, ...]:
        """The placements, in the order in which they are first reached."""
        return tuple(dict.fromkeys(part.placement for part in self.by_name.values()))

    @property
    def entry(self) -> str:
        """The placement that takes the input."""
        return next(part.placement for part in self.by_name.values() if self.input in part.inputs)

    @functools.cached_property
    def crossings(self) -> tuple[Crossing, ...]:
        """What is sent between placements, each tensor once to each placement, in the order of the producers."""
        found: dict[tuple[str, str], Crossing] = {}
        for name in self.order:
            for edge in self.edges:
                source, target = (self.by_name[end].placement for end in (edge.producer, edge.consumer))
                if edge.producer != name or source == target:
                    continue
                for item in edge.transfers:
                    if item.codec is not None:
                        crossing = Crossing(item.tensor, item.codec, name, source, target)
                        found.setdefault((item.tensor, target), crossing)
        return tuple(found.values())

    @functools.cached_property
    def codecs(self) -> dict[str, Codec]:
        """The codec of each tensor that is sent."""
        return {crossing.tensor: crossing.codec for crossing in self.crossings}

    @functools.cached_property
    def settings(self) -> dict[str, Tensor]:
        """What each side supplies from the codecs it knows, by name: ``layer2.levels``."""
        found: dict[str, Tensor] = {}
        for tensor, codec in self.codecs.items():
            found |= codec.settings_of(tensor)
        return found

    def behind(self, name: str) -> Codec | None:
        """Return the codec of integer codes by which a partition's outputs are sent, if there is one."""
        codecs = [crossing.codec for crossing in self.crossings if crossing.producer == name]
        return max((codec for codec in codecs if codec.levels), key=lambda codec: codec.levels, default=None)

    def with_codecs(self, codecs: Mapping[str, Codec]) -> Route:
        """Return this route with other codecs for some of the tensors that are sent.

        Raises:
            BundleError: A name is not that of a tensor that is sent.
        """
        if unknown := [name for name in codecs if name not in self.codecs]:
            near = did_you_mean(unknown[0], self.codecs)
            raise BundleError(f"no tensor {unknown[0]!r} is sent; sent are {', '.join(self.codecs) or 'none'}.{near}")

        def other(item: Transfer) -> Transfer:
            return item if item.codec is None else Transfer(item.tensor, codecs.get(item.tensor, item.codec))

        edges = [dataclasses.replace(edge, transfers=tuple(map(other, edge.transfers))) for edge in self.edges]
        return dataclasses.replace(self, edges=tuple(edges))

    def with_bits(self, bits: int | None) -> Route:
        """Return this route with another width of all codes, 2 to 16; ``None``: this one.

        Raises:
            CodecError: ``bits`` is out of range, or no codes are sent.
        """
        if bits is None:
            return self
        if not self.codecs:
            raise CodecError(f"bits={bits}: this network is not split, so it sends no codes")
        some = any(codec.levels for codec in self.codecs.values())
        changed = {name: codec.with_bits(bits) for name, codec in self.codecs.items() if codec.levels or not some}
        return self.with_codecs(changed)

    def path(self, start: str, end: str) -> list[Edge]:
        """Return the edges between placements on the way from one partition to another with the fewest of them.

        Raises:
            BundleError: No edges lead there.
        """
        best: dict[str, list[Edge]] = {start: []}
        for name in self.order:
            for edge in self.edges:
                if edge.consumer != name or edge.producer not in best:
                    continue
                crosses = self.by_name[edge.producer].placement != self.by_name[name].placement
                way = best[edge.producer] + ([edge] if crosses else [])
                if name not in best or len(way) < len(best[name]):
                    best[name] = way
        if end not in best:
            raise BundleError(f"no edges lead from {start} to {end}")
        return best[end]

    def after(self, name: str) -> set[str]:
        """Return the partitions that take something of one, directly or through others."""
        found = {name}
        for later in self.order:
            if any(edge.consumer == later and edge.producer in found for edge in self.edges):
                found.add(later)
        return found - {name}


def _check_partitions(route: Route) -> None:
    """Check that each edge joins two partitions that are there."""
    if not route.partitions:
        raise BundleError("the route is empty: a bundle has at least one partition")
    names = [part.name for part in route.partitions]
    if twice := repeated(names):
        raise BundleError(f"the partition {', '.join(twice)} appears twice")
    if twice := repeated(edge.name for edge in route.edges):
        raise BundleError(f"the edge {', '.join(twice)} appears twice; give one edge all its tensors")
    for edge in route.edges:
        for end in (edge.producer, edge.consumer):
            if end not in names:
                known = f"known are {', '.join(names)}.{did_you_mean(end, names)}"
                raise BundleError(f"the edge {edge.name} names the unknown partition {end}; {known}")


def _check_edges(route: Route) -> None:
    """Check each transfer, and that a tensor goes through one codec to all that take it."""
    codecs: dict[str, Codec] = {}
    for edge in route.edges:
        for item in edge.transfers:
            _check_transfer(route, edge, item)
            if item.codec is not None and codecs.setdefault(item.tensor, item.codec) != item.codec:
                raise BundleError(f"{item.tensor} is sent by two different codecs; send it by one to all that take it")


def _check_names(route: Route) -> None:
    """Check that each name says one tensor."""
    emitted: dict[str, str] = {}
    for part in route.partitions:
        for name in part.outputs:
            if name in emitted:
                raise BundleError(f"{name} is emitted by {emitted[name]} and by {part.name}; each name is one tensor's")
            emitted[name] = part.name
    if route.input in emitted:
        raise BundleError(f"{route.input} is the network's input, and {emitted[route.input]} emits it too; rename one")
    for name in route.results:
        if name not in emitted:
            raise BundleError(
                f"no partition emits the output {name}; emitted are {', '.join(emitted)}.{did_you_mean(name, emitted)}"
            )


def _check_transfer(route: Route, edge: Edge, item: Transfer) -> None:
    """Check that a tensor is emitted, is taken, and can pass."""
    producer, consumer = route.by_name[edge.producer], route.by_name[edge.consumer]
    if missing := [name for name in item.sent.values() if name not in producer.outputs]:
        raise BundleError(
            f"the edge {edge.name} sends {', '.join(missing)}, which {producer.name} does not emit; "
            f"it emits {', '.join(producer.outputs)}"
        )
    if not set(item.delivered.values()) & set(consumer.inputs):
        raise BundleError(
            f"the edge {edge.name} delivers {', '.join(item.delivered.values())}, none of which {consumer.name} takes; "
            f"it takes {', '.join(consumer.inputs)}"
        )
    if producer.placement != consumer.placement:
        if item.codec is None:
            raise BundleError(
                f"the edge {edge.name} goes from {producer.placement} to {consumer.placement}, so {item.tensor} needs "
                "a codec that makes bytes of it"
            )
    elif item.codec is not None and not item.codec.whole:
        raise BundleError(
            f"the edge {edge.name} stays on {producer.placement}, where nothing is sent: the {item.codec.kind} codec "
            f"of {item.tensor} needs two placements; place {producer.name} and {consumer.name} apart"
        )


def _check_inputs(route: Route) -> None:
    """Check that every input is given, and the network's own in one placement."""
    at = {part.placement for part in route.partitions if route.input in part.inputs}
    if not at:
        raise BundleError(f"no partition takes the network's input {route.input}")
    if len(at) > 1:
        raise BundleError(
            f"the input {route.input} is taken on {' and on '.join(sorted(at))}; it comes to one placement, so let a "
            "partition there pass it on"
        )
    for part in route.partitions:
        given = {route.input, *route.settings}
        for edge in route.edges:
            if edge.consumer == part.name:
                given.update(*(item.delivered.values() for item in edge.transfers))
        if missing := [name for name in part.inputs if name not in given]:
            raise BundleError(
                f"partition {part.name} takes {', '.join(missing)}, which nothing gives; given are "
                f"{', '.join(sorted(given))}.{did_you_mean(missing[0], given)}"
            )
        if not set(part.inputs) - route.settings.keys():
            raise BundleError(f"partition {part.name} takes no tensor of samples")


def _check_outputs(route: Route) -> None:
    """Check that somebody takes what is emitted."""
    for part in route.partitions:
        taken = set(route.results)
        for edge in route.edges:
            if edge.producer == part.name:
                taken.update(*(item.sent.values() for item in edge.transfers))
        if unused := [name for name in part.outputs if name not in taken]:
            raise BundleError(
                f"partition {part.name} emits {', '.join(unused)}, which no edge, exit or output of the network takes"
            )


def _cycle(before: Mapping[str, set[str]]) -> Sequence[str]:
    """Return the names on a cycle, the first one again at its end, among partitions that all wait for another."""
    way = [next(iter(before))]
    while way.count(way[-1]) == 1:
        way.append(min(before[way[-1]] & before.keys()))
    return way[way.index(way[-1]) :][::-1]
