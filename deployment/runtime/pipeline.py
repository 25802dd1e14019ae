"""Running a bundle's route in one process, through the very bytes that would go over a network."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..bundle.edges import Crossing
from ..bundle.files import BundleError
from ..bundle.loading import Bundle
from ..codecs.codec import Codec
from ..codecs.packing import CodecError, PayloadError
from ..exits.policy import ExitPolicy
from ..exits.specs import LOGITS
from .preprocess import ImageInput, open_image
from .side import Outcome, Side
from .walk import Message, follow


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


class Pipeline:
    """All sides of a bundle in one process: device part, bytes, server part.

    At early exits samples leave as the policy says; only those that go on are encoded and sent.

    Args:
        bundle: A loaded bundle, all placements of it.
        bits: Width of all codes, 2 to 16; ``None`` keeps what the bundle says.
        policy: Another exit policy than the bundle's.
        codecs: Other codecs by tensor, such as one that tries a lossy link.
        envelope: Whether payloads have an :class:`~cleave.deployment.Envelope`; ``None``: as the bundle says.

    Attributes:
        sides: The sides by placement.
        route: The bundle's route, at that width and with those codecs.
        crossings: All that is sent, by the names of :attr:`Result.payloads`.
        policy: Who decides at the exits, or ``None``.

    Raises:
        ValueError: ``bits`` is out of range, or no codes are sent; or the policy does not fit the bundle's exits.

    Example:
        >>> pipeline = Pipeline(load_bundle("bundle"), bits=4)  # doctest: +SKIP
        >>> pipeline.run_files(["cat.jpg"]).logits.argmax(1)  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Bundle,
        bits: int | None = None,
        policy: ExitPolicy | None = None,
        codecs: Mapping[str, Codec] | None = None,
        envelope: bool | None = None,
    ) -> None:
        self.bundle = bundle
        placements = bundle.manifest.route.placements
        if missing := [placement for placement in placements if placement not in bundle.placements]:
            raise BundleError(f"a pipeline needs all placements, but {', '.join(missing)} was not loaded; take a Side")
        self.sides = {place: Side(bundle, place, bits, policy, codecs, envelope=envelope) for place in placements}
        first = self.sides[placements[0]]
        self.route, self.policy = first.route, first.policy
        self.crossings = _named([*self.route.crossings, *first.states])
        self._names = {(crossing.tensor, crossing.target): name for name, crossing in self.crossings.items()}

    @property
    def codecs(self) -> dict[str, Codec]:
        """The codec of each tensor of the network that is sent between placements."""
        return dict(self.route.codecs)

    @property
    def exit_macs(self) -> list[int]:
        """MACs per sample of leaving at each exit, by this policy."""
        manifest, classes = self.bundle.manifest, len(self.bundle.class_names)
        found, extra = [], 0
        for index, item in enumerate(manifest.exits):
            extra += self.policy.macs(index, classes) if self.policy is not None else 0
            extra -= manifest.policy.macs(index, classes) if manifest.policy is not None else 0
            found.append(item.macs + extra)
        return found

    def preprocess(self, path: str | os.PathLike[str]) -> Tensor:
        """Read an image file as the network takes it: uint8 (C, H, W).

        Raises:
            ImageError: It cannot be used; the message names the path.
            BundleError: The network takes no images.
        """
        spec = self.bundle.input
        if not isinstance(spec, ImageInput):
            raise BundleError(f"this network takes {spec.name}, {spec.dtype} {list(spec.shape)}, not image files")
        return spec(open_image(path))

    def run_files(self, paths: Sequence[str | os.PathLike[str]]) -> Result:
        """Run image files as one batch; see :meth:`run`."""
        if not paths:
            raise ValueError("paths is empty: name at least one image file")
        return self.run(torch.stack([self.preprocess(path) for path in paths]))

    def run(self, inputs: Tensor) -> Result:
        """Run a batch through every partition and every codec, each sample as far as it goes.

        Args:
            inputs: (B, …), as the bundle's ``input`` makes them: images uint8 (B, C, H, W), not normalised.

        Returns:
            Outputs, payloads and times.

        Raises:
            BundleError: ``inputs`` is no tensor, or has another dtype or shape; or a partition cannot compute with it.
            PayloadError: Some samples could not be sent. The others' result is the error's ``outcome``, in which the
                outputs of those that failed are NaN, or 0 where they are whole numbers, and their exit is -1.
        """
        message = self.sides[self.route.entry].message(inputs)
        if not isinstance(inputs, Tensor):
            raise BundleError(f"a pipeline takes the network's input as a tensor, got {type(inputs).__name__}")
        gathered = _Gathered(self, inputs.shape[0])
        request = object()
        steps = {place: self._step(place, request, gathered) for place in self.sides}
        try:
            # Once for the whole route: what leaves it is copied outside.
            with torch.inference_mode():
                follow(steps, self.route.entry, message)
        finally:
            for side in self.sides.values():
                side.forget(request)
        if gathered.errors:
            raise PayloadError(gathered.errors, gathered.result())
        return gathered.result()

    def _step(self, place: str, request: object, gathered: _Gathered) -> Callable[[Message], dict[str, Message]]:
        def step(message: Message) -> dict[str, Message]:
            try:
                outcome = self.sides[place].run(message, request)
            except PayloadError as error:
                gathered.errors |= error.errors
                outcome = error.outcome
            gathered.add(outcome)
            return outcome.messages

        return step


class _Gathered:
    """What the sides made of one batch."""

    def __init__(self, pipeline: Pipeline, batch: int) -> None:
        self.manifest, self.batch = pipeline.bundle.manifest, batch
        self.names, self.rows = pipeline._names, tuple(range(batch))
        self.payloads = {name: [b""] * batch for name in self.names.values()}
        self.part_seconds = dict.fromkeys(pipeline.route.order, 0.0)
        self.encode_seconds, self.decode_seconds = (dict.fromkeys(self.names.values(), 0.0) for _ in range(2))
        self.answers: dict[str, list[tuple[tuple[int, ...], Tensor]]] = collections.defaultdict(list)
        self.exits = torch.full((batch,), -1) if self.manifest.exits else None
        self.errors: dict[int, CodecError] = {}

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


def _named(crossings: Sequence[Crossing]) -> dict[str, Crossing]:
    """Name what is sent: by its tensor, and by its target too where there are several."""
    times = collections.Counter(crossing.tensor for crossing in crossings)
    return {
        crossing.tensor if times[crossing.tensor] == 1 else f"{crossing.tensor}@{crossing.target}": crossing
        for crossing in crossings
    }
