"""The early exits of a bundle: where they stand, and which policies can decide there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle.canonical_json import parse, typed
from ..bundle.edges import Crossing
from ..bundle.files import BundleError
from ..bundle.limits import check_label
from ..bundle.route import Route
from ..codecs.codec import FloatCodec
from .policies import policy_from_dict
from .policy import ExitPolicy

LOGITS = "logits"
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
        check_label(self.name, "an exit")
        if self.macs < 0 or not 0 <= (self.accuracy or 0) <= 1:
            raise BundleError(f"exit {self.name} has macs={self.macs} or accuracy={self.accuracy} out of range")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ExitSpec:
        """Read an exit; :class:`BundleError` if a key, type or value is wrong."""
        return cls(**typed(values, "an exit", name=str, partition=str, macs=int, accuracy=(float, int, type(None))))


def exit_logits(exits: Sequence[ExitSpec]) -> list[str]:
    """Return the name of each exit's logits: ``NAME/logits``, and ``logits`` of the last one."""
    return [LOGITS if item is exits[-1] else f"{item.name}/{LOGITS}" for item in exits]


def check_exits(exits: Sequence[ExitSpec], policy: ExitPolicy | None, outputs: Sequence[str]) -> None:
    """Check exits, policy and outputs against each other.

    Args:
        exits: In the order in which they are reached; empty where there are none.
        policy: Who decides there, or nobody.
        outputs: Names of the network's outputs.

    Raises:
        BundleError: They do not fit.
    """
    if not exits:
        if policy is not None:
            raise BundleError(f"the policy {policy.kind} has nothing to decide: there are no exits")
        return
    if tuple(outputs) != (LOGITS,):
        raise BundleError(f"exits answer with {LOGITS} alone, but the network's outputs are {', '.join(outputs)}")
    if policy is not None:
        check_policy(policy, exits)
    names = [item.name for item in exits]
    if len(set(names)) < len(names):
        raise BundleError(f"each exit needs a name of its own, got {', '.join(names)}")


def check_places(exits: Sequence[ExitSpec], route: Route) -> None:
    """Raise :class:`BundleError` unless exits stand where the route leads, and each emits its logits."""
    if exits:
        _check_order(exits, route)
    for item, logits in zip(exits, exit_logits(exits), strict=True):
        part = route.by_name[item.partition]
        if logits not in part.outputs:
            emitted = ", ".join(part.outputs)
            raise BundleError(f"the exit {item.name} stands behind {part.name}, which emits {emitted}, but no {logits}")


def check_policy(policy: ExitPolicy, exits: Sequence[ExitSpec]) -> None:
    """Raise :class:`BundleError` unless a policy was made for so many exits."""
    if policy.exits != len(exits):
        raise BundleError(
            f"the policy {policy.kind} is for {policy.exits} exits, but this network has {len(exits)}; "
            "take one that was made for it"
        )


def state_crossings(policy: ExitPolicy | None, exits: Sequence[ExitSpec], classes: int, route: Route) -> list[Crossing]:
    """Return what a policy must know of the exits before where the next one stands in another placement.

    Each part of its state goes as float32 with the edges that lead there, named for the exit it comes from:
    ``layer1/agreed``.

    Args:
        policy: Who decides, or nobody.
        exits: In the order in which they are reached.
        classes: Number of classes.
        route: The partitions and their edges.

    Raises:
        ValueError: The policy is for another number of classes.
    """
    found: list[Crossing] = []
    if policy is None or not policy.carries:
        return found
    last = len(exits) - (1 if policy.final_needs_state else 2)
    for index, (item, following) in enumerate(itertools.pairwise(exits)):
        if index >= last:
            break
        if route.by_name[item.partition].placement == route.by_name[following.partition].placement:
            continue  # it stays there, wherever the samples go in between
        state = policy.state_behind(index, classes)
        for edge in route.path(item.partition, following.partition):
            source, target = (route.by_name[end].placement for end in (edge.producer, edge.consumer))
            for name, example in state.items():
                codec = FloatCodec(tuple(example.shape[1:]) or (1,))
                found.append(Crossing(f"{item.name}/{name}", codec, edge.producer, source, target, state=name))
    return found


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


def _check_order(exits: Sequence[ExitSpec], route: Route) -> None:
    """Check that who leaves at an exit is still awaited by all that runs behind it, and by nobody else."""
    if unknown := [item for item in exits if item.partition not in route.by_name]:
        raise BundleError(f"the exit {unknown[0].name} stands behind {unknown[0].partition}, which is no partition")
    place_of = {name: place for place, name in enumerate(route.order)}
    places = [place_of[item.partition] for item in exits]
    if places != sorted(set(places)) or places[-1] != len(route.order) - 1 or len(places) < 2:
        raise BundleError(
            f"exits are at least two, in the order of the route, one a partition, the last at its end; got "
            f"{', '.join(item.partition for item in exits)} on the route {' > '.join(route.order)}"
        )
    for item, place in zip(exits[:-1], places, strict=False):
        behind = route.after(item.partition)
        if beside := [name for name in route.order[place + 1 :] if name not in behind]:
            raise BundleError(
                f"partition {beside[0]} runs beside the exit {item.name} and takes nothing of {item.partition}, so it "
                "would not know who has left there; list it before, or give it a tensor from there"
            )
    if (macs := [item.macs for item in exits]) != sorted(macs):
        raise BundleError(f"the MACs of exits are cumulative, so they do not fall; got {macs}")
