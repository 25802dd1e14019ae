"""What the sides of a route make of a batch, put together again: the same for all that runs a bundle."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..bundle.edges import Crossing
from ..bundle.files import BundleError
from ..bundle.manifest import Manifest
from ..codecs.packing import CodecError, PayloadError
from ..exits.specs import LOGITS
from .side import Outcome
from .walk import Message


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a batch of B samples, and what it took.

    Args:
        outputs: The network's outputs by name, (B, …), on the CPU.
        payloads: By the name of each tensor that is sent between placements, one payload per sample: ``layer2``, and
            ``layer1/agreed`` for what an exit policy must know; where a tensor goes to several placements, by
            ``NAME@PLACEMENT`` for each. Nothing is sent, ``b""``, of a sample that left before.
        part_seconds: Wall-clock seconds of each partition for the whole batch, by name, in the order of the route; 0
            for one that no sample reached.
        encode_seconds: Seconds from tensors to bytes, by the names of ``payloads``.
        decode_seconds: Seconds from bytes to tensors, likewise.
        exits: Which exit each sample left at, int64 (B,), from 0 in the order of the manifest's exits; ``None`` for a
            network without early exits.
    """

    outputs: dict[str, Tensor]
    payloads: dict[str, list[bytes]]
    part_seconds: dict[str, float]
    encode_seconds: dict[str, float]
    decode_seconds: dict[str, float]
    exits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Scores of the classes, float32 (B, C), of a network that has this output.

        Raises:
            BundleError: It has other outputs.
        """
        if LOGITS not in self.outputs:
            raise BundleError(f"this network has no logits; its outputs are {', '.join(self.outputs)}")
        return self.outputs[LOGITS]

    @property
    def payload_bytes(self) -> list[int]:
        """Bytes on the wire of each sample, over all that is sent."""
        batch = len(next(iter(self.outputs.values())))
        return [sum(len(payloads[i]) for payloads in self.payloads.values()) for i in range(batch)]


class Gathered:
    """What the sides made of one batch.

    Args:
        manifest: The bundle's manifest.
        crossings: All that is sent, by name, see :func:`named`.
        batch: How many samples there are.
    """

    def __init__(self, manifest: Manifest, crossings: Mapping[str, Crossing], batch: int) -> None:
        self.manifest, self.batch = manifest, batch
        self.names = {(crossing.tensor, crossing.target): name for name, crossing in crossings.items()}
        self.rows = tuple(range(batch))
        self.payloads = {name: [b""] * batch for name in self.names.values()}
        self.part_seconds = dict.fromkeys(manifest.route.order, 0.0)
        self.encode_seconds, self.decode_seconds = (dict.fromkeys(self.names.values(), 0.0) for _ in range(2))
        self.answers: dict[str, list[tuple[tuple[int, ...], Tensor]]] = collections.defaultdict(list)
        self.exits = torch.full((batch,), -1) if self.manifest.exits else None
        self.errors: dict[int, CodecError] = {}

    def step(self, run: Callable[[Message], Outcome]) -> Callable[[Message], dict[str, Message]]:
        """Return a placement's step of the route; what it came to, and which samples failed, is noted here."""

        def step(message: Message) -> dict[str, Message]:
            try:
                outcome = run(message)
            except PayloadError as error:
                self.errors |= error.errors
                outcome = error.outcome
            self.add(outcome)
            return outcome.messages

        return step

    def add(self, outcome: Outcome) -> None:
        """Add what one side made of a message."""
        self.part_seconds |= outcome.part_seconds
        self.encode_seconds |= {self.names[key]: spent for key, spent in outcome.encode_seconds.items()}
        self.decode_seconds |= {self.names[key]: spent for key, spent in outcome.decode_seconds.items()}
        for target, message in outcome.messages.items():
            for tensor, payloads in message.payloads.items():
                if message.rows == self.rows:
                    self.payloads[self.names[tensor, target]] = payloads
                    continue
                for row, payload in zip(message.rows, payloads, strict=True):
                    self.payloads[self.names[tensor, target]][row] = payload
        for name, answers in outcome.outputs.items():
            self.answers[name].append((outcome.rows, answers))
        if self.exits is not None and outcome.rows:
            self.exits[torch.tensor(outcome.rows)] = torch.tensor(outcome.exits)

    def unsent(self, target: str, rows: Sequence[int]) -> None:
        """Note that nothing of some samples has reached a placement."""
        for (_, place), name in self.names.items():
            if place == target and rows:
                kept = set(rows)
                self.payloads[name] = [b"" if row in kept else each for row, each in enumerate(self.payloads[name])]

    def result(self) -> Result:
        """Return everything, each sample in its place."""
        outputs = {}
        for output in self.manifest.outputs:
            answers = self.answers[output.name]
            if len(answers) == 1 and answers[0][0] == self.rows:
                # A copy, as what comes out of inference mode cannot be trained on.
                outputs[output.name] = answers[0][1].clone()
                continue
            empty = torch.empty(0, *(0 if isinstance(n, str) else n for n in output.shape), dtype=torch.float32)
            found = torch.cat([tensor for _, tensor in answers] or [empty])
            rows = [row for some, _ in answers for row in some]
            nothing = math.nan if found.is_floating_point() else 0
            whole = found.new_full((len(self.rows), *found.shape[1:]), nothing)
            if rows:
                whole[torch.tensor(rows)] = found
            outputs[output.name] = whole
        seconds = (self.part_seconds, self.encode_seconds, self.decode_seconds)
        return Result(outputs, self.payloads, *seconds, self.exits)


def named(crossings: Sequence[Crossing]) -> dict[str, Crossing]:
    """Name what is sent: by its tensor, and by its target too where there are several."""
    times = collections.Counter(crossing.tensor for crossing in crossings)
    return {
        crossing.tensor if times[crossing.tensor] == 1 else f"{crossing.tensor}@{crossing.target}": crossing
        for crossing in crossings
    }
