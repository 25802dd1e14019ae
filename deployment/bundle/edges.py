"""The edges of a route: what passes from one partition to another, and how."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..codecs.codec import Codec, codec_from_dict
from ..naming import listed
from .canonical_json import typed
from .files import BundleError
from .limits import MAX_TENSORS, at_most, check_label


class Signature(NamedTuple):
    """A partition as its route sees it.

    Attributes:
        name: Its name.
        placement: Where it runs.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
    """

    name: str
    placement: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One tensor of an edge.

    Args:
        tensor: Its name, the same on both sides. What a codec makes of it has its name before a dot: ``layer2.codes``.
        codec: How it becomes bytes; ``None`` hands it over, which only partitions of one placement can do.
    """

    tensor: str
    codec: Codec | None = None

    @property
    def sent(self) -> dict[str, str]:
        """Names of what the producer emits, by the codec's own names."""
        return {self.tensor: self.tensor} if self.codec is None else self.codec.sent(self.tensor)

    @property
    def delivered(self) -> dict[str, str]:
        """Names of what the consumer may take, by the codec's own names."""
        return {self.tensor: self.tensor} if self.codec is None else self.codec.delivered(self.tensor)


@dataclasses.dataclass(frozen=True)
class Edge:
    """What passes from one partition to another.

    Args:
        producer: The partition that emits it.
        consumer: The partition that takes it.
        transfers: The tensors, at least one.
    """

    producer: str
    consumer: str
    transfers: tuple[Transfer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "transfers", tuple(self.transfers))
        at_most(self.transfers, MAX_TENSORS, f"the transfers of the edge {self.name:.200}")
        for item in self.transfers:
            check_label(item.tensor, f"a tensor on the edge {self.name:.200}")
        if not self.transfers:
            raise BundleError(f"the edge {self.name} carries nothing: name at least one tensor")
        if twice := repeated(item.tensor for item in self.transfers):
            raise BundleError(f"the edge {self.name} carries {listed(twice)} twice")

    @property
    def name(self) -> str:
        """Producer and consumer, for messages."""
        return f"{self.producer} > {self.consumer}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        items = [{"tensor": t.tensor, "codec": None if t.codec is None else t.codec.to_dict()} for t in self.transfers]
        return {"producer": self.producer, "consumer": self.consumer, "transfers": items}

    @classmethod
    def from_dict(cls, values: Any) -> Edge:
        """Read an edge; :class:`BundleError` or ``CodecError`` if a key, type or value is wrong."""
        found = typed(values, "an edge", producer=str, consumer=str, transfers=list)
        items = [typed(item, "a transfer", tensor=str, codec=(dict, type(None))) for item in found["transfers"]]
        transfers = [
            Transfer(item["tensor"], None if item["codec"] is None else codec_from_dict(item["codec"]))
            for item in items
        ]
        return cls(found["producer"], found["consumer"], tuple(transfers))


@dataclasses.dataclass(frozen=True)
class Crossing:
    """One tensor that is sent from a placement to another, once for all that take it there.

    Args:
        tensor: Its name.
        codec: How it becomes bytes.
        producer: The partition behind which it is sent.
        source: Where that partition runs.
        target: Where it goes.
        state: The name under which an exit policy knows it, if it is part of a policy's state.
    """

    tensor: str
    codec: Codec
    producer: str
    source: str
    target: str
    state: str | None = None


def repeated(values: Iterable[str]) -> list[str]:
    """Return what occurs more than once."""
    return sorted(value for value, times in collections.Counter(values).items() if times > 1)
