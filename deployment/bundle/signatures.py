"""What each partition of a route takes and returns, by its place between codecs and exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..codecs.codec import Codec
from .files import BundleError

EXIT_LOGITS, BEFORE = "exit_logits", "before"


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


def part_inputs(codecs: Sequence[Codec], index: int, before: bool = False) -> tuple[str, ...]:
    """Names of the inputs that partition ``index`` of a route takes, in order.

    The first takes ``images``, each other one what the codec before it delivers; then come the settings of the codec
    behind it, ``levels`` for integer codes, named ``next_levels`` where the partition also receives ``levels``; and
    last, in a cascade of exits, ``before``, the logits of the exit before.
    """
    received = ("images",) if index == 0 else codecs[index - 1].delivers
    settings = codecs[index].settings if index < len(codecs) else {}
    named = (f"next_{name}" if name in received else name for name in settings)
    return (*received, *named, *((BEFORE,) if before else ()))


def part_outputs(codecs: Sequence[Codec], index: int, exits: bool = False) -> tuple[str, ...]:
    """Names of the outputs of partition ``index``: what the codec behind it sends, or ``logits`` at the end.

    Where an early exit stands behind it, ``exit_logits`` come last.
    """
    sent = codecs[index].sends if index < len(codecs) else ("logits",)
    return (*sent, EXIT_LOGITS) if exits else sent


def part_arguments(
    inputs: Sequence[str], received: Mapping[str, Tensor], codec: Codec | None, before: Tensor | None = None
) -> dict[str, Tensor]:
    """Return what a partition takes, in order.

    Args:
        inputs: Names of its inputs.
        received: ``images``, or what it received.
        codec: The codec behind it, whose settings it takes.
        before: The logits of the exit before, for a partition that takes them.
    """
    settings = codec.settings if codec else {}
    known = {**received, **{f"next_{name}" if name in received else name: value for name, value in settings.items()}}
    return {**known, BEFORE: before} if before is not None and BEFORE in inputs else known


def check_signatures(parts: Sequence[Signature], codecs: Sequence[Codec], exits: Sequence[int] = ()) -> None:
    """Raise :class:`BundleError` unless the inputs and outputs of partitions are those of their places on the route.

    Args:
        parts: In the order of the route.
        codecs: One for each edge between them.
        exits: The places that end with an early exit.
    """
    for index, part in enumerate(parts):
        cascades = BEFORE in part.inputs and index in exits and min(exits) < index
        for what, found, wanted in (
            ("takes", part.inputs, part_inputs(codecs, index, cascades)),
            ("returns", part.outputs, part_outputs(codecs, index, index in exits)),
        ):
            if tuple(found) != wanted:
                raise BundleError(
                    f"partition {part.name}, number {index + 1} of the route, {what} ({', '.join(found)}); "
                    f"between these codecs {'and exits ' if exits else ''}it must be ({', '.join(wanted)})"
                )
