"""The early exits of a bundle: where they stand, and which policies can decide there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle.canonical_json import parse
from ..bundle.files import BundleError
from ..bundle.signatures import BEFORE, Signature
from ..bundle.typed_json import typed
from ..codecs.codec import Codec, FloatCodec
from .policies import policy_from_dict
from .policy import ExitPolicy

_MAX_POLICY_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class ExitSpec:
    """One exit of a bundle; the last one is the network's own classifier.

    Args:
        name: Its name, unique among the exits: the layer it stands behind, or ``final``.
        partition: The partition that ends with it.
        macs: Multiply-accumulates per sample of leaving there: all partitions until then, and the policy's own work.
        accuracy: What was measured of its answers, 0 to 1, or ``None``.
    """

    name: str
    partition: str
    macs: int
    accuracy: float | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise BundleError("an exit needs a name")
        if self.macs < 0 or not 0 <= (self.accuracy or 0) <= 1:
            raise BundleError(f"exit {self.name} has macs={self.macs} or accuracy={self.accuracy} out of range")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ExitSpec:
        """Read an exit; :class:`BundleError` if a key, type or value is wrong."""
        return cls(**typed(values, "an exit", name=str, partition=str, macs=int, accuracy=(float, int, type(None))))


def check_exits(exits: Sequence[ExitSpec], policy: ExitPolicy | None, parts: Sequence[Signature]) -> list[int]:
    """Check exits and policy against the partitions of a route.

    Args:
        exits: In the order of the route; empty where there are none.
        policy: Who decides there, or nobody.
        parts: The partitions in the order of the route.

    Returns:
        The places on the route of the early exits, all but the last.

    Raises:
        BundleError: They do not fit, or a decision needs what is known in another placement only.
    """
    if not exits:
        if policy is not None:
            raise BundleError(f"the policy {policy.kind} has nothing to decide: there are no exits")
        return []
    places = _places(exits, [part.name for part in parts])
    placements = [part.placement for part in parts]
    for index, placement in enumerate(placements[2:], start=2):
        if placement in placements[: index - 1] and placement != placements[index - 1]:
            raise BundleError(
                f"the route returns to the placement {placement} at {parts[index].name}; samples that go on never come "
                f"back, so place what runs there one after the other, got {' > '.join(placements)}"
            )
    for earlier, later in itertools.pairwise(places):
        if BEFORE in parts[later].inputs and placements[earlier] != placements[later]:
            raise BundleError(
                f"the exit at {parts[later].name} on {placements[later]} reads the logits of the exit before it on "
                f"{placements[earlier]}: a stateless partition knows only what its codec delivers; place the exits of "
                "a cascade together, or train without exits.cascade"
            )
    if policy is not None:
        check_policy(policy, [placements[place] for place in places])
    return places[:-1]


def check_policy(policy: ExitPolicy, placements: Sequence[str]) -> None:
    """Check that a policy can decide at exits that stand in some placements.

    Args:
        policy: Decides at each exit.
        placements: Where each exit runs, the last one included.

    Raises:
        BundleError: It is for another number of exits, or needs state on a stateless partition.
    """
    if policy.exits != len(placements):
        raise BundleError(
            f"the policy {policy.kind} is for {policy.exits} exits, but this network has {len(placements)}; "
            "take one that was made for it"
        )
    last = len(placements) if policy.final_needs_state else len(placements) - 1
    if policy.carries and len(set(placements[:last])) > 1:
        raise BundleError(
            f"a policy that needs state on a stateless partition: {policy.kind} goes by what the exits before have "
            f"said, but the exits run on {', '.join(dict.fromkeys(placements))}, and a partition there knows only what "
            "its codec delivers; take confidence, entropy or margin, or place these exits together"
        )


def is_local(codec: Codec, placement: str, following: str) -> bool:
    """Whether an edge stays inside one placement, where tensors are handed over and nothing is sent."""
    return placement == following and isinstance(codec, FloatCodec)


def read_policy(path: str | Path) -> ExitPolicy:
    """Read an exit policy from a JSON file that holds what ``ExitPolicy.to_dict`` returns.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, or not a policy; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no exit policy at {path}; exits_report.py writes one")
    with path.open("rb") as file:
        content = file.read(_MAX_POLICY_BYTES + 1)
    try:
        if len(content) > _MAX_POLICY_BYTES:
            raise ValueError(f"it has more than the {_MAX_POLICY_BYTES} bytes allowed")
        return policy_from_dict(parse(content))
    except ValueError as error:
        raise ValueError(f"the exit policy {path} cannot be read: {error}") from error


def _places(exits: Sequence[ExitSpec], route: Sequence[str]) -> list[int]:
    """Return the place of each exit's partition on the route."""
    names = [item.name for item in exits]
    if len(set(names)) < len(names):
        raise BundleError(f"each exit needs a name of its own, got {', '.join(names)}")
    if unknown := [item for item in exits if item.partition not in route]:
        raise BundleError(f"the exit {unknown[0].name} stands behind {unknown[0].partition}, which is no partition")
    places = [route.index(item.partition) for item in exits]
    if places != sorted(set(places)) or places[-1] != len(route) - 1 or len(places) < 2:
        raise BundleError(
            f"exits are at least two, in the order of the route, one a partition, the last at its end; got "
            f"{', '.join(item.partition for item in exits)} on the route {' > '.join(route)}"
        )
    if (macs := [item.macs for item in exits]) != sorted(macs):
        raise BundleError(f"the MACs of exits are cumulative, so they do not fall; got {macs}")
    return places
