"""The device side of a bundle whose other placements run on servers: it exits early, sends, and copes without them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..bundle.files import BundleError
from ..bundle.loading import Bundle
from ..bundle.versions import bundle_name
from ..checks import expect, is_whole
from ..codecs.packing import PayloadError
from ..exits.policies import ConfidencePolicy
from ..exits.policy import ExitPolicy
from ..exits.specs import LOGITS
from ..naming import listed
from .asking.remote import Remote, Sent
from .asking.retrying import AWAY, Breaker, Retries
from .gathering import Gathered, Result, named
from .inputs import read_input
from .pipeline import Pipeline
from .side import Outcome, Side
from .trust import Trust
from .walk import Message, follow
from .wire.status import ServingError

FALLBACKS = ("error", "exit", "local")


@dataclasses.dataclass(frozen=True)
class Answered:
    """What came of a batch of B samples.

    Args:
        result: What a pipeline's result says too: outputs, exits, payloads, and the seconds on this side.
        attempts: How often a server was asked for each sample; 0 for those that left on this side.
        flags: For each sample ``""``, or by which fallback it was answered: ``exit`` or ``local``.
        seconds: Seconds of the batch by stage: ``device``, ``encode``, ``link``, ``wait``, ``server``.
    """

    result: Result
    attempts: tuple[int, ...]
    flags: tuple[str, ...]
    seconds: dict[str, float]

    def lines(self, bundle: Bundle) -> list[dict[str, Any]]:
        """Return a line of plain JSON values for each sample: class, exit, bytes, milliseconds, attempts, flag."""
        names, scores = bundle.class_names, self.result.outputs.get(LOGITS)
        exits = None if self.result.exits is None else self.result.exits.tolist()
        milliseconds = {stage: round(1000 * spent, 3) for stage, spent in self.seconds.items()}
        found = []
        for row, count in enumerate(self.result.payload_bytes):
            whole = scores is not None and bool(scores[row].isfinite().all())
            place = -1 if exits is None else exits[row]
            found.append(
                {
                    "class": names[int(scores[row].argmax())] if scores is not None and whole and names else None,
                    "exit": bundle.manifest.exits[place].name if place >= 0 else None,
                    "bytes": count,
                    "milliseconds": milliseconds,
                    "attempts": self.attempts[row],
                    "flag": self.flags[row],
                }
            )
        return found


class Device:
    """Runs the partitions where a request begins, and lets servers do the rest.

    Args:
        bundle: A loaded bundle; ``load_bundle(directory, placement=…)`` loads this side alone.
        server: ``HOST:PORT`` of the server of the next placement; or addresses by placement.
        name: The bundle's name on the servers; ``None``: that of its folder here, or of the folder around a version.
        bits: Width of all codes, 2 to 16; ``None`` keeps what the bundle says.
        trust: Certificates and token.
        retries: How long and how often a server is asked.
        breaker: Makes what says when a server is not asked any more; one is made for each.
        fallback: What is done where a server is away: ``error`` raises, ``exit`` answers by the last exit of this side,
            ``local`` by ``local``.
        local: A loaded bundle of a whole model for the same input and the same outputs.
        in_flight: Most batches of a stream that are on their way at once.

    Attributes:
        link: What is known of the way to the next placement.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: An argument is out of range, the fallback has nothing to answer with, or a token would be sent in
            the clear to another machine.

    Example:
        >>> device = Device(load_bundle("bundle", placement="device"), "server:8001")  # doctest: +SKIP
        >>> device.run(images).result.logits.argmax(1)  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Bundle,
        server: str | Mapping[str, str],
        name: str | None = None,
        bits: int | None = None,
        trust: Trust | None = None,
        retries: Retries | None = None,
        breaker: Callable[[], Breaker] = Breaker,
        fallback: str = "error",
        local: Bundle | None = None,
        in_flight: int = 4,
    ) -> None:
        expect("bundle", bundle, Bundle, "load_bundle(directory) loads one")
        expect("server", server, (str, Mapping), "give HOST:PORT, or an address for each placement")
        expect("trust", trust, (Trust, type(None)), "Trust(authorities=FILE) makes one")
        expect("retries", retries, (Retries, type(None)), "Retries(timeout=SECONDS) makes one")
        expect("local", local, (Bundle, type(None)), "load_bundle(directory) loads one")
        if not is_whole(in_flight) or in_flight < 1:
            raise ValueError(f"in_flight must be a whole number of at least 1, got {in_flight!r}")
        self.bundle, self.in_flight = bundle, in_flight
        self.placement = bundle.manifest.route.entry
        self.side = Side(bundle, self.placement, bits)
        self.crossings = named([*self.side.route.crossings, *self.side.states])
        self.fallback, self._instead = fallback, self._fallback(fallback, local, bits)
        addresses = self._addresses(server)
        called = bundle_name(bundle.directory) if name is None else name
        self.remotes: dict[str, Remote] = {}
        try:
            for place, address in addresses.items():
                self.remotes[place] = Remote(self.side, place, address, called, bits, trust, retries, breaker())
        except BaseException:
            self.close()
            raise
        self.link = next(iter(self.remotes.values())).link
        # A side is one thread's: batches of a stream take turns, and overlap while they are on their way.
        self._computing = threading.Lock()

    def _addresses(self, server: str | Mapping[str, str]) -> dict[str, str]:
        others = [place for place in self.bundle.manifest.route.placements if place != self.placement]
        if not others:
            raise ValueError(f"server={server}: this bundle runs on {self.placement} alone, so there is nothing to ask")
        if isinstance(server, str):
            return {next(each.target for each in self.crossings.values() if each.source == self.placement): server}
        if unknown := [place for place in server if place not in others]:
            raise ValueError(
                f"server names the placement {unknown[0]!r}; the others of this bundle are {listed(others)}"
            )
        if not server:
            raise ValueError(f"server names no placement; the others of this bundle are {listed(others)}")
        return dict(server)

    def _fallback(
        self, fallback: str, local: Bundle | None, bits: int | None
    ) -> Callable[[Tensor], tuple[dict[str, Tensor], int]] | None:
        """Return what answers in a server's place: outputs of some inputs, and their exit."""
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback must be one of {', '.join(FALLBACKS)}, got {fallback!r}")
        if (local is not None) != (fallback == "local"):
            found = "no local bundle" if local is None else f"the local bundle {local.directory}"
            raise ValueError(f"fallback={fallback} with {found}; fallback=local takes one, and no other does")
        if fallback == "exit":
            return self._by_exit(bits)
        return None if local is None else self._by_local(local)

    def _by_exit(self, bits: int | None) -> Callable[[Tensor], tuple[dict[str, Tensor], int]]:
        """Answer by the best exit of this side: the most accurate, where that was measured, else the last."""
        manifest, route = self.bundle.manifest, self.bundle.manifest.route
        elsewhere = [part.name for part in route.partitions if part.placement != self.placement]
        behind = set(elsewhere).union(*(route.after(name) for name in elsewhere))
        policy: ExitPolicy = manifest.policy or ConfidencePolicy((None,) * (len(manifest.exits) - 1))
        latest = len(manifest.exits) if policy.latest is None else policy.latest
        here = [i for i, item in enumerate(manifest.exits) if item.partition not in behind and i <= latest]
        if not here:
            places = zip(manifest.exits, manifest.exit_placements, strict=True)
            found = ", ".join(f"{item.name} on {place}" for item, place in places) or "none at all"
            raise ValueError(f"fallback=exit needs an exit on {self.placement}; the exits of this bundle are: {found}")
        known = [manifest.exits[i].accuracy for i in here]
        best = here[-1] if None in known else max(zip(known, here, strict=True), key=lambda pair: pair)[1]
        # As if it were the last exit, at which all leave.
        side = Side(self.bundle, self.placement, bits, dataclasses.replace(policy.with_thresholds(None), latest=best))
        return lambda inputs: (side.run(inputs, request=object()).outputs, best)

    def _by_local(self, local: Bundle) -> Callable[[Tensor], tuple[dict[str, Tensor], int]]:
        own, other = self.bundle.manifest, local.manifest
        if own.input != other.input or own.outputs != other.outputs:
            raise ValueError(
                f"the local bundle {local.directory} takes or answers something else than {self.bundle.directory}; "
                "both need the same input and the same outputs, class names among them"
            )
        pipeline = Pipeline(local)
        return lambda inputs: (pipeline.run(inputs).outputs, -1)

    def close(self) -> None:
        """Close the connections; what is on its way ends without an answer."""
        for remote in self.remotes.values():
            remote.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def connect(self) -> None:
        """Compare this side's bundle with those of the servers, which the first batch does otherwise.

        Raises:
            ServingError: A server is away, and there is no fallback, or it does not serve the bundle.
            BundleError: It serves another one.
        """
        for remote in self.remotes.values():
            try:
                remote.connect()
            except ServingError as error:
                self._check_instead(error)

    def preprocess(self, path: str | os.PathLike[str]) -> Tensor:
        """Read an image file as the network takes it: uint8 (C, H, W).

        Raises:
            ImageError: It cannot be used; the message names the path.
            BundleError: The network takes no images.
        """
        return read_input(self.bundle.input, path)

    def run(self, inputs: Tensor) -> Answered:
        """Run a batch: each sample as far as it goes here, and the others on the servers.

        Args:
            inputs: (B, …), as the bundle's ``input`` makes them: images uint8 (B, C, H, W), not normalised.

        Raises:
            BundleError: ``inputs`` has another dtype or shape; or a server has another bundle.
            ValueError: The device is closed.
            ServingError: A server gave no answer, and there is no fallback, or the request itself is refused.
            PayloadError: Some samples could not be sent or computed; the others' answers are its ``outcome``.
        """
        for remote in self.remotes.values():
            remote.check_open()
        message = self.side.message(inputs)
        if not isinstance(inputs, Tensor):
            raise BundleError(f"a device takes the network's input as a tensor, got {type(inputs).__name__}")
        batch = _Batch(self, inputs, Gathered(self.bundle.manifest, self.crossings, len(inputs)))
        request = object()
        steps = {place: batch.gathered.step(functools.partial(batch.ask, place)) for place in self._places()}
        steps[self.placement] = batch.gathered.step(functools.partial(self._compute, request))
        try:
            with torch.inference_mode():
                follow(steps, self.placement, message)
        finally:
            self.side.forget(request)
        answered = batch.answered()
        if batch.gathered.errors:
            raise PayloadError(batch.gathered.errors, answered)
        return answered

    def _check_instead(self, error: ServingError) -> None:
        """Raise an error again, unless the server is away and something answers in its place."""
        if error.code not in AWAY or self._instead is None:
            raise error

    def _places(self) -> list[str]:
        return [place for place in self.bundle.manifest.route.placements if place != self.placement]

    def _compute(self, request: object, arrived: Message) -> Outcome:
        with self._computing:
            return self.side.run(arrived, request)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Answered]:
        """Run batches such that one computes while others are sent and waited for; answers come in their order.

        No more than ``in_flight`` batches are held at once: the next is taken once the oldest has been answered.
        Who leaves a stream does not wait for what is on its way; :meth:`close` ends that.

        Raises:
            Exception: As :meth:`run`, at the place of the batch that failed; what is behind it is dropped.
        """
        waiting: collections.deque[Future[Answered]] = collections.deque()
        pool = ThreadPoolExecutor(self.in_flight, thread_name_prefix="device")
        try:
            for batch in batches:
                waiting.append(pool.submit(self.run, batch))
                # A slow source holds up no answer that is there.
                while len(waiting) >= self.in_flight or (waiting and waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Batch:
    """One batch on its way.

    Args:
        device: Who runs it.
        inputs: What came in.
        gathered: What has become of it.
    """

    def __init__(self, device: Device, inputs: Tensor, gathered: Gathered) -> None:
        self.device, self.inputs, self.gathered = device, inputs, gathered
        self.flags = [""] * len(inputs)
        self.sent = Sent()
        self.instead = 0.0

    def ask(self, place: str, arrived: Message) -> Outcome:
        """Let a server go on, or answer in its place."""
        remote = self.device.remotes.get(place)
        if remote is None:
            raise ServingError("FAILED_PRECONDITION", f"samples go on to {place}, whose server is not known; name it")
        try:
            return remote.run(arrived, self.sent)
        except ServingError as error:
            self.device._check_instead(error)
            return self._instead(place, arrived)

    def _instead(self, place: str, arrived: Message) -> Outcome:
        start = time.monotonic()
        rows = torch.tensor(arrived.rows, dtype=torch.int64)
        answer = self.device._instead
        if answer is None:
            raise BundleError("there is no fallback")
        with self.device._computing:
            outputs, exit = answer(self.inputs[rows])
        for row in arrived.rows:
            self.flags[row] = self.device.fallback
        self.gathered.unsent(place, [row for row in arrived.rows if not self.sent.attempts[row]])
        self.instead += time.monotonic() - start
        exits = (exit,) * len(arrived.rows) if self.device.bundle.manifest.exits else ()
        return Outcome(rows=arrived.rows, outputs=outputs, exits=exits)

    def answered(self) -> Answered:
        """Return everything."""
        result = self.gathered.result()
        own = {
            "device": sum(result.part_seconds.values()) + self.instead,
            "encode": sum(result.encode_seconds.values()),
        }
        attempts = tuple(self.sent.attempts[row] for row in range(len(self.inputs)))
        return Answered(result, attempts, tuple(self.flags), {**own, **self.sent.seconds})
