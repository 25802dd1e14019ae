"""One side of a bundle at work: what a device, an edge or a server does with what comes to it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bundle.draws import Draw
from ..bundle.edges import Crossing
from ..bundle.envelope import Envelope
from ..bundle.files import BundleError
from ..bundle.loading import Bundle
from ..checks import is_whole
from ..codecs.codec import Codec
from ..codecs.packing import CodecError, PayloadError
from ..exits.policy import ExitPolicy
from ..exits.specs import LOGITS, check_policy, exit_logits, state_crossings
from .each import decode_each, encode_each
from .walk import Message, Visit, Walk, taken


@dataclasses.dataclass
class Outcome:
    """What a side made of what came to it.

    Args:
        messages: What leaves, by the placement it is for; send it there.
        rows: The samples of the request that were answered now.
        outputs: Their answers by name, on the CPU, one row for each of ``rows``.
        exits: Which exit each of them left at, from 0 in the order of the manifest's exits; empty where there are none.
        part_seconds: Wall-clock seconds of each partition that ran.
        encode_seconds: Seconds from tensors to bytes, by tensor and the placement it goes to.
        decode_seconds: Seconds from bytes to tensors, by tensor and the placement it came to.
    """

    messages: dict[str, Message] = dataclasses.field(default_factory=dict)
    rows: tuple[int, ...] = ()
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    exits: tuple[int, ...] = ()
    part_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    encode_seconds: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    decode_seconds: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)


class Side:
    """All partitions of one placement. What waits for a later message stays here under its request's name.

    Both ends of a route need the same ``bits`` and ``policy``. Made for one thread.

    Args:
        bundle: A loaded bundle; ``load_bundle(directory, placement=…)`` loads this side alone.
        placement: Which side.
        bits: Width of all codes, 2 to 16; ``None`` keeps what the bundle says.
        policy: Another exit policy than the bundle's.
        codecs: Other codecs by tensor, such as one that tries a lossy link.
        limit: How many requests may wait here; where more come, the oldest is forgotten.
        envelope: Whether payloads have an :class:`~cleave.deployment.Envelope`; ``None``: as the bundle says. Both ends
            need the same.

    Attributes:
        route: The bundle's route, at that width and with those codecs.
        policy: Who decides at the exits, or ``None``.

    Raises:
        ValueError: The bundle lacks the placement or it was not loaded, ``bits`` is out of range, or a policy or codec
            does not fit.

    Example:
        >>> device = Side(load_bundle("bundle", placement="device"), "device")  # doctest: +SKIP
        >>> sent = device.run(images, request=7).messages["server"]  # doctest: +SKIP
        >>> server = Side(load_bundle("bundle", placement="server"), "server")  # doctest: +SKIP
        >>> server.run(sent, request=7).outputs["logits"]  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Bundle,
        placement: str,
        bits: int | None = None,
        policy: ExitPolicy | None = None,
        codecs: Mapping[str, Codec] | None = None,
        limit: int = 256,
        envelope: bool | None = None,
    ) -> None:
        manifest = bundle.manifest
        manifest.at(placement)  # refuses a placement that the bundle lacks
        if placement not in bundle.placements:
            raise BundleError(f"{placement} was not loaded; loaded is {', '.join(bundle.placements)}")
        if not is_whole(limit) or limit < 1:
            raise ValueError(f"limit must be a whole number of at least 1, got {limit!r}")
        if policy is not None and not manifest.exits:
            raise BundleError(f"the policy {policy.kind} has nothing to decide: this bundle has no exits")
        if policy is not None:
            check_policy(policy, manifest.exits)
        self.bundle, self.placement, self.limit = bundle, placement, limit
        self.route = manifest.route.with_bits(bits).with_codecs(codecs or {})
        self.policy = manifest.policy if policy is None else policy
        self.states = state_crossings(self.policy, manifest.exits, len(bundle.class_names), self.route)
        self.examples = self._state_examples()
        self.envelopes = self._envelopes(manifest.envelope if envelope is None else envelope)
        self._visits: dict[Hashable, Visit] = {}
        self._walk = _Running(self)

    def _state_examples(self) -> list[dict[str, Tensor]]:
        """Return the policy's state behind each early exit where it is sent, in its own shapes and types."""
        if self.policy is None or not self.states:
            return []
        return [self.policy.state_behind(exit, len(self.bundle.class_names)) for exit in range(self.policy.exits - 1)]

    def _envelopes(self, wanted: bool) -> dict[tuple[str, str], Envelope]:
        """Return the envelope of each tensor that comes or leaves here, by its name and where it goes."""
        found = [item for item in (*self.route.crossings, *self.states) if self.placement in (item.source, item.target)]
        for crossing in found:
            crossing.codec.prepare()
        digest = self.bundle.manifest.digest
        return {
            (item.tensor, item.target): Envelope(digest, item.tensor, item.target, item.codec)
            for item in found
            if wanted
        }

    @property
    def waiting(self) -> tuple[Hashable, ...]:
        """The requests of which something waits here, the oldest first."""
        return tuple(self._visits)

    def forget(self, request: Hashable) -> None:
        """Drop what waits of a request, if anything does."""
        self._visits.pop(request, None)

    def run(self, arrived: Tensor | Message, request: Hashable) -> Outcome:
        """Take in what came for a request and go on as far as that leads.

        Args:
            arrived: The network's input for B samples, where it begins here; or what another side sent.
            request: Names the request, the same on all sides; anything that can be a key of a dictionary.

        Returns:
            What leaves for other placements, and the samples that were answered.

        Raises:
            BundleError: It is not what this side takes, or came before.
            PayloadError: The payloads of some samples are damaged or not this side's, a partition emits of them what
                its codec cannot send, or their answers are not finite. The others are not touched by that: what became
                of them is the error's ``outcome``; go on with it. The request forgets the samples that failed.
        """
        message = self.message(arrived)
        visit = self._visits.get(request) or Visit()
        walk = self._walk.anew()
        outcome = walk.outcome
        # What cannot be taken in is refused before anything that waits is touched.
        outcome.messages = walk.step(visit, message)
        if walk.finished(visit):
            self.forget(request)
        else:
            self._visits[request] = visit
            if len(self._visits) > self.limit:
                self.forget(next(iter(self._visits)))
        if walk.failed:
            raise PayloadError(walk.failed, outcome)
        return outcome

    def message(self, arrived: Any) -> Message:
        """Return what came to this side as a message; :class:`BundleError` where it is nothing that a side takes."""
        if isinstance(arrived, Message):
            return arrived
        if isinstance(arrived, Tensor) and arrived.ndim:
            return Message(tuple(range(arrived.shape[0])), {self.route.input: arrived})
        spec = self.bundle.input
        found = "a scalar" if isinstance(arrived, Tensor) else type(arrived).__name__
        raise BundleError(
            f"{self.placement} takes a message of another side or a tensor {spec.name}, {spec.dtype} "
            f"{[-1, *spec.shape]}, got {found}"
        )


class _Running(Walk):
    """A walk through real bytes that answers samples as the policy says."""

    def __init__(self, side: Side) -> None:
        super().__init__(side.route, side.placement, side.states)
        self.bundle, self.policy, self.outcome = side.bundle, side.policy, Outcome()
        self.examples, self.envelopes = side.examples, side.envelopes
        manifest = side.bundle.manifest
        self.results = [output.name for output in manifest.outputs]
        self.last = len(manifest.exits) - 1
        self.exits = {item.partition: i for i, item in enumerate(manifest.exits)}
        self.logits = exit_logits(manifest.exits)
        self.waits = side.bundle.device.type == "cuda"

    def anew(self) -> _Running:
        """Return a walk of its own for one call, as threads may share a side."""
        walk = object.__new__(type(self))
        walk.__dict__ = {**self.__dict__, "outcome": Outcome(), "failed": {}}
        return walk

    def run(self, name: str, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        start = self._now()
        outputs = self.bundle.partitions[name](arguments)
        self.outcome.part_seconds[name] = self._now() - start
        return outputs

    def draw(self, draw: Draw, rows: Sequence[int]) -> Tensor:
        return draw.fresh(len(rows))

    def send(self, crossing: Crossing, tensors: dict[str, Tensor], rows: Sequence[int]) -> list[bytes]:
        start, key = self._now(), (crossing.tensor, crossing.target)
        payloads, errors = encode_each(crossing.codec, self.envelopes.get(key), tensors, rows)
        self.failed |= errors
        self.outcome.encode_seconds[key] = self._now() - start
        return payloads

    def receive(self, crossing: Crossing, payload: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        start, key = self._now(), (crossing.tensor, crossing.target)
        if not isinstance(payload, list | tuple):
            raise BundleError(f"{crossing.tensor} must come as a list of payloads, got {type(payload).__name__}")
        tensors, errors = decode_each(crossing.codec, self.envelopes.get(key), payload, rows)
        self.failed |= errors
        self.outcome.decode_seconds[key] = self._now() - start
        return tensors

    def have_run(self, visit: Visit, name: str, outputs: dict[str, Tensor]) -> None:
        exit = self.exits.get(name)
        if exit is not None and self.policy is not None:
            found = self._sound(visit, {self.logits[exit]: outputs[self.logits[exit]]})
            if visit.rows:
                self._decide(visit, self.policy, exit, found[self.logits[exit]])
        elif found := {key: outputs[key] for key in self.results if key in outputs}:
            found, rows = self._sound(visit, found), visit.rows or ()
            if rows:
                self._answer(rows, found, [self.last] * len(rows) if self.exits else ())

    def _sound(self, visit: Visit, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave samples out whose answer says nothing, as a damaged payload may make it; the others go on."""
        broken: set[int] = set()
        for name, tensor in outputs.items():
            # What is not finite is not finite in the sum; a sum of finite values may overflow too, so that is a hint.
            if not math.isfinite(tensor.sum().item()):
                finite = tensor.isfinite()
                for place in (~finite.reshape(tensor.shape[0], -1).all(1)).nonzero().squeeze(1).tolist():
                    broken.add(place)
                    error = CodecError(f"{name} holds NaN or infinity: the payload or the input is damaged")
                    self.failed[(visit.rows or ())[place]] = error
        if not broken:
            return outputs
        places = [place for place in range(len(visit.rows or ())) if place not in broken]
        visit.keep(places)
        return taken(outputs, places)

    def _decide(self, visit: Visit, policy: ExitPolicy, exit: int, logits: Tensor) -> None:
        batch, classes = logits.shape
        state = self._restored(visit.state, exit, logits) if exit else policy.start(batch, classes, logits)
        answer, leave, visit.state = policy.decide(exit, logits, state)
        gone = leave.nonzero().squeeze(1).tolist()
        if not gone:
            return
        left = taken({LOGITS: answer}, gone) if len(gone) < batch else {LOGITS: answer}
        rows = visit.rows or ()
        self._answer([rows[place] for place in gone], left, [exit] * len(gone))
        visit.keep((~leave).nonzero().squeeze(1).tolist())

    def _restored(self, state: Mapping[str, Tensor], exit: int, logits: Tensor) -> dict[str, Tensor]:
        """Return the state behind the exit before, which may have come as float32, in the policy's own types."""
        if not self.examples:
            return dict(state)
        examples = self.examples[exit - 1]
        return {
            name: value.reshape(len(value), *examples[name].shape[1:]).to(logits.device, examples[name].dtype)
            for name, value in state.items()
        }

    def _answer(self, rows: Sequence[int], outputs: Mapping[str, Tensor], exits: Sequence[int]) -> None:
        """Note answers, those of samples that left here before among them."""
        out = self.outcome
        out.rows = out.rows if out.rows == tuple(rows) else (*out.rows, *rows)
        out.exits = (*out.exits, *exits)
        for name, tensor in outputs.items():
            known = out.outputs.get(name)
            out.outputs[name] = tensor.cpu() if known is None else torch.cat([known, tensor.cpu()])

    def _now(self) -> float:
        """Seconds, after all that was queued on an accelerator has run."""
        if self.waits:
            torch.cuda.synchronize(self.bundle.device)
        return time.perf_counter()
