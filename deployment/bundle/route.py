"""The route of a bundle: a graph of partitions and of the tensors that pass between them."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..codecs.codec import Codec
from ..codecs.packing import CodecError
from ..naming import did_you_mean, listed
from .draws import Draw
from .edges import Crossing, Edge, Signature, Transfer, repeated
from .files import BundleError
from .limits import MAX_EDGES, MAX_EXITS, MAX_OUTPUTS, MAX_PARTITIONS, MAX_TENSORS, at_most, check_label


@dataclasses.dataclass(frozen=True)
class Route:
    """Partitions and the edges between them, checked: a graph without cycles in which nothing is missing.

    Args:
        partitions: What runs, in any order.
        edges: What passes between them.
        input: Name of the network's input, which the partitions of one placement take.
        results: Outputs that nobody need take: the network's own, and the logits of exits.
        draws: Random inputs that the placement of the one partition that takes each makes by itself.

    Raises:
        BundleError: A name appears twice or is unknown, the edges form a cycle, a partition takes what nothing gives or
            emits what nobody takes, or a codec does not fit the placements.
    """

    partitions: tuple[Signature, ...]
    edges: tuple[Edge, ...]
    input: str
    results: tuple[str, ...]
    draws: tuple[Draw, ...] = ()

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
        places = {part.name: place for place, part in enumerate(self.partitions)}
        before = {name: {edge.producer for edge in self.into[name]} for name in places}
        missing = {name: len(needs) for name, needs in before.items()}
        ready = [place for name, place in places.items() if not missing[name]]
        order: list[str] = []
        while ready:
            order.append(self.partitions[heapq.heappop(ready)].name)
            for edge in self.out_of[order[-1]]:
                missing[edge.consumer] -= 1
                if not missing[edge.consumer]:
                    heapq.heappush(ready, places[edge.consumer])
        if rest := {name: before[name] for name in places if missing[name]}:
            raise BundleError(f"the route has a cycle: {' > '.join(_cycle(rest))}; a tensor must come first")
        return tuple(order)

    @functools.cached_property
    def into(self) -> dict[str, list[Edge]]:
        """The edges that end at each partition, as they are listed."""
        found: dict[str, list[Edge]] = {part.name: [] for part in self.partitions}
        for edge in self.edges:
            found[edge.consumer].append(edge)
        return found

    @functools.cached_property
    def out_of(self) -> dict[str, list[Edge]]:
        """The edges that begin at each partition, as they are listed."""
        found: dict[str, list[Edge]] = {part.name: [] for part in self.partitions}
        for edge in self.edges:
            found[edge.producer].append(edge)
        return found

    @functools.cached_property
    def by_name(self) -> dict[str, Signature]:
        """The partitions by name, in the order in which they run."""
        known = {part.name: part for part in self.partitions}
        return {name: known[name] for name in self.order}

    @functools.cached_property
    def placements(self) -> tuple[str, ...]:
        """The placements, in the order in which they are first reached."""
        return tuple(dict.fromkeys(part.placement for part in self.by_name.values()))

    @functools.cached_property
    def entry(self) -> str:
        """The placement that takes the input."""
        return next(part.placement for part in self.by_name.values() if self.input in part.inputs)

    @functools.cached_property
    def crossings(self) -> tuple[Crossing, ...]:
        """What is sent between placements, each tensor once to each placement, in the order of the producers."""
        found: dict[tuple[str, str], Crossing] = {}
        for name in self.order:
            for edge in self.out_of[name]:
                source, target = (self.by_name[end].placement for end in (edge.producer, edge.consumer))
                if source == target:
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

    @functools.cached_property
    def drawn(self) -> dict[str, Draw]:
        """The draws by name."""
        return {draw.name: draw for draw in self.draws}

    @functools.cached_property
    def supplied(self) -> frozenset[str]:
        """All that a side supplies by itself: settings and draws."""
        return frozenset({*self.settings, *self.drawn})

    def behind(self, name: str) -> Codec | None:
        """Return the codec of integer codes by which a partition's outputs are sent, if there is one."""
        return self._widest.get(name)

    @functools.cached_property
    def _widest(self) -> dict[str, Codec]:
        found: dict[str, Codec] = {}
        for crossing in self.crossings:
            known = found.get(crossing.producer)
            if crossing.codec.levels > (0 if known is None else known.levels):
                found[crossing.producer] = crossing.codec
        return found

    def with_codecs(self, codecs: Mapping[str, Codec]) -> Route:
        """Return this route with other codecs for some of the tensors that are sent.

        Raises:
            BundleError: A name is not that of a tensor that is sent.
        """
        if unknown := [name for name in codecs if name not in self.codecs]:
            near = did_you_mean(unknown[0], self.codecs)
            raise BundleError(f"no tensor {unknown[0]!r} is sent; sent are {listed(self.codecs) or 'none'}.{near}")

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
            for edge in self.into[name]:
                if edge.producer not in best:
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
            if any(edge.producer in found for edge in self.into[later]):
                found.add(later)
        return found - {name}


def _check_partitions(route: Route) -> None:
    """Check that each edge joins two partitions that are there."""
    if not route.partitions:
        raise BundleError("the route is empty: a bundle has at least one partition")
    at_most(route.partitions, MAX_PARTITIONS, "partitions")
    at_most(route.edges, MAX_EDGES, "edges")
    at_most(route.draws, MAX_TENSORS, "draws")
    at_most(route.results, MAX_OUTPUTS + MAX_EXITS, "outputs and exits")
    names = [part.name for part in route.partitions]
    if twice := repeated(names):
        raise BundleError(f"the partition {listed(twice)} appears twice")
    if twice := repeated(edge.name for edge in route.edges):
        raise BundleError(f"the edge {listed(twice)} appears twice; give one edge all its tensors")
    known = set(names)
    for edge in route.edges:
        for end in (edge.producer, edge.consumer):
            if end not in known:
                near = f"known are {listed(names)}.{did_you_mean(end, names)}"
                raise BundleError(f"the edge {edge.name:.300} names the unknown partition {end:.150}; {near}")
    for part in route.partitions:
        for kind, tensors in (("inputs", part.inputs), ("outputs", part.outputs)):
            at_most(tensors, MAX_TENSORS, f"the {kind} of {part.name}")
            for name in tensors:
                check_label(name, f"one of the {kind} of {part.name}")


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
    if twice := repeated(draw.name for draw in route.draws):
        raise BundleError(f"{listed(twice)} is drawn twice; each name is one tensor's")
    for name in route.drawn:
        if name == route.input or name in emitted or name in route.settings:
            raise BundleError(f"{name} is drawn, and given otherwise too; rename one")
        takers = [part.name for part in route.partitions if name in part.inputs]
        if len(takers) != 1:
            found = listed(takers) or "none"
            raise BundleError(f"{name} is drawn for one partition, but those that take it are: {found}")
    for name in route.results:
        if name not in emitted:
            raise BundleError(
                f"no partition emits the output {name}; emitted are {listed(emitted)}.{did_you_mean(name, emitted)}"
            )


def _check_transfer(route: Route, edge: Edge, item: Transfer) -> None:
    """Check that a tensor is emitted, is taken, and can pass."""
    producer, consumer = route.by_name[edge.producer], route.by_name[edge.consumer]
    if missing := [name for name in item.sent.values() if name not in producer.outputs]:
        raise BundleError(
            f"the edge {edge.name} sends {listed(missing)}, which {producer.name} does not emit; "
            f"it emits {listed(producer.outputs)}"
        )
    if not set(item.delivered.values()) & set(consumer.inputs):
        raise BundleError(
            f"the edge {edge.name} delivers {listed(item.delivered.values())}, none of which {consumer.name} takes; "
            f"it takes {listed(consumer.inputs)}"
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
        given = set().union(*(item.delivered.values() for edge in route.into[part.name] for item in edge.transfers))
        if missing := [n for n in part.inputs if n not in given and n not in route.supplied and n != route.input]:
            given |= {route.input, *route.supplied}
            raise BundleError(
                f"partition {part.name} takes {listed(missing)}, which nothing gives; given are "
                f"{listed(sorted(given))}.{did_you_mean(missing[0], given)}"
            )
        if all(name in route.supplied for name in part.inputs):
            raise BundleError(f"partition {part.name} takes no tensor of samples")


def _check_outputs(route: Route) -> None:
    """Check that somebody takes what is emitted."""
    results = set(route.results)
    for part in route.partitions:
        taken = set().union(*(item.sent.values() for edge in route.out_of[part.name] for item in edge.transfers))
        if unused := [name for name in part.outputs if name not in taken and name not in results]:
            raise BundleError(
                f"partition {part.name} emits {listed(unused)}, which no edge, exit or output of the network takes"
            )


def _cycle(before: Mapping[str, set[str]]) -> Sequence[str]:
    """Return the names on a cycle, the first one again at its end, among partitions that all wait for another."""
    way = [next(iter(before))]
    places: dict[str, int] = {}
    while way[-1] not in places:
        places[way[-1]] = len(way) - 1
        way.append(min(before[way[-1]] & before.keys()))
    return way[places[way[-1]] :][::-1]
