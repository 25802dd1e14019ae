"""A placement that runs elsewhere, as a client sees it."""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
import torch
from torch import Tensor

from ...bundle.files import BundleError
from ...codecs.packing import CodecError, PayloadError
from ..side import Outcome, Side
from ..trust import Trust, explained
from ..walk import Message
from ..wire.protocol import METHODS, USUAL_MESSAGE_BYTES, message, set_parameters, written
from ..wire.signatures import ERROR, EXIT, Signature, only_visit
from ..wire.status import RowError, ServingError
from ..wire.tensors import MOST_SAMPLES, declare_input, split
from .retrying import Breaker, LinkEstimate, Retries

_LONGEST_PAUSE_MS = 1000
# Versions of a bundle among which this side's is looked for, the newest first.
_MOST_VERSIONS = 32
# What is said of requests that fitted what the server was when it was asked first.
_OTHERWISE = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"})


@dataclasses.dataclass
class Sent:
    """What it took to ask a placement, of one batch.

    Args:
        attempts: Tries by sample; a batch that is too large for the server is asked in parts.
        seconds: Wall-clock seconds by stage: ``link``, ``wait`` in the server's queue, and ``server`` computing.
    """

    attempts: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"link": 0.0, "wait": 0.0, "server": 0.0})


class _Known(NamedTuple):
    """What a server says of a bundle: the version that is this side's, "" for the newest, and its largest batch."""

    version: str
    most: int


class Remote:
    """A placement behind a server.

    Args:
        side: The side that asks.
        placement: The placement.
        address: ``HOST:PORT``.
        name: The bundle's name on the server.
        bits: Width of the codes, if another than the bundle's.
        trust: Certificates and token.
        retries: How often it is asked.
        breaker: When it is not asked any more.

    Attributes:
        link: What is known of the way there.

    Raises:
        ValueError: ``address`` is none, or the placement is entered several times.
    """

    def __init__(
        self,
        side: Side,
        placement: str,
        address: str,
        name: str,
        bits: int | None = None,
        trust: Trust | None = None,
        retries: Retries | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        manifest = side.bundle.manifest
        trust = trust or Trust()
        trust.check_target(checked_host("server", address))
        only_visit(manifest, placement)
        self.side, self.placement, self.address, self.bits = side, placement, address, bits
        self.model = f"{name}.{manifest.at(placement)[0].name}"
        self.signature = Signature(manifest, placement)
        self.retries, self.breaker = retries or Retries(), breaker or Breaker()
        self.link = LinkEstimate()
        self._known: _Known | None = None
        self._closed = threading.Event()
        self._channel = _channel(address, trust, self.signature)
        secret = trust.secret()
        self._metadata = () if secret is None else (("authorization", f"Bearer {secret}"),)
        self._stubs = {
            "ModelInfer": self._stub("ModelInfer", None),  # what is sent is written already
            "ModelMetadata": self._stub("ModelMetadata", METHODS["ModelMetadata"].request.SerializeToString),
        }

    def _stub(self, method: str, write: Callable[[Any], bytes] | None) -> Any:
        return self._channel.unary_unary(METHODS[method].path, write, METHODS[method].response.FromString)

    def close(self) -> None:
        """Close the connection; what is on its way ends without an answer."""
        self._closed.set()
        self._channel.close()

    def check_open(self) -> None:
        """Raise :class:`ValueError` where the connection was closed."""
        if self._closed.is_set():
            raise ValueError(f"the connection to {self.address} is closed; make a new device, which opens its own")

    def connect(self) -> int:
        """Compare both sides' bundles, once; return the most samples that the server takes at once.

        Raises:
            ServingError: The server is not there, or does not serve it.
            BundleError: It serves another bundle, or another placement.
        """
        return self._told().most

    def _told(self) -> _Known:
        """Return what the server says of this bundle, which it is asked once."""
        self.check_open()
        if self._known is None:
            self._known = self._checked()
        return self._known

    def _checked(self) -> _Known:
        own, newest = self.side.bundle.manifest.digest, self._described("")
        # Who has an older version goes on with it, while others have the new one.
        older = [] if newest.properties["digest"] == own else list(newest.versions)[: -_MOST_VERSIONS - 1 : -1]
        for version in ["", *older]:
            found = self._described(version) if version else newest
            if found.properties["digest"] == own:
                return self._fitting(found, version)
        others = f", as none of its versions {', '.join(older)} has" if len(older) > 1 else ""
        raise BundleError(
            f"{self.model} on {self.address} is of the bundle {newest.properties['digest'] or 'of no digest'}, this "
            f"side has {own}{others}; give both sides the same bundle"
        )

    def _described(self, version: str) -> Any:
        request = message("ModelMetadataRequest")(name=self.model, version=version)
        return self._asked("ModelMetadata", request)[0]

    def _fitting(self, found: Any, version: str) -> _Known:
        """Return what is told of a version of this bundle; :class:`BundleError` where it is of another placement."""
        if (place := found.properties["placement"]) != self.placement:
            raise BundleError(f"{self.address} serves the placement {place} of this bundle, not {self.placement}")
        most = found.properties["max_batch_size"]
        return _Known(version, max(1, min(int(most), MOST_SAMPLES)) if most.isdecimal() else 1)

    def run(self, arrived: Message, sent: Sent, seconds: float = math.inf) -> Outcome:
        """Send what goes to the placement, and return what it has made of it.

        Args:
            arrived: What this side sends.
            sent: Notes what that took.
            seconds: Most that all tries may take, where that is less than ``retries`` say.

        Raises:
            ServingError: There is no answer.
            PayloadError: There is none of some samples.
        """
        known = self._known
        try:
            return self._in_parts(arrived, sent, seconds)
        except ServingError as error:
            if error.code not in _OTHERWISE or known is None:
                raise
            # It may have been started anew, with another version or for smaller batches, since it was asked for them.
            self._known = None
            if self._told() == known:
                raise
        return self._in_parts(arrived, sent, seconds)

    def _in_parts(self, arrived: Message, sent: Sent, seconds: float) -> Outcome:
        """Ask for as many samples at once as the server takes."""
        known, parts = self._told(), []
        errors: dict[int, CodecError] = {}
        for start in range(0, len(arrived.rows), known.most):
            some = slice(start, start + known.most)
            rows = arrived.rows[some]
            payloads = {tensor: payload[some] for tensor, payload in arrived.payloads.items()}
            response = self._answered(Message(rows, payloads), known.version, sent, seconds)
            outcome, failed = self._outcome(response, rows)
            parts.append(outcome)
            errors |= failed
        outcome = parts[0] if len(parts) == 1 else _joined(parts)
        if errors:
            raise PayloadError(errors, outcome)
        return outcome

    def _answered(self, arrived: Message, version: str, sent: Sent, seconds: float) -> Any:
        request = self._request(arrived, version)
        start = time.monotonic()
        try:
            response, attempts = self._asked("ModelInfer", request, seconds)
        except ServingError as error:
            sent.attempts.update(dict.fromkeys(arrived.rows, error.attempts))
            sent.seconds["link"] += time.monotonic() - start
            raise
        wait, server = (response.parameters[f"{each}_seconds"].double_param for each in ("wait", "compute"))
        link = max(time.monotonic() - start - wait - server, 0.0)
        sent.attempts.update(dict.fromkeys(arrived.rows, attempts))
        for stage, spent in (("link", link), ("wait", wait), ("server", server)):
            sent.seconds[stage] += spent
        if attempts == 1:
            self.link.add(_bytes_of(arrived) + response.ByteSize(), link)
        return response

    def _request(self, arrived: Message, version: str = "") -> bytes:
        request = message("ModelInferRequest")(model_name=self.model, model_version=version)
        own: dict[str, str | int | float | bool] = {"digest": self.side.bundle.manifest.digest}
        set_parameters(request.parameters, own | ({} if self.bits is None else {"bits": self.bits}))
        contents = []
        for slot in self.signature.by_payload:
            payloads = arrived.payloads[slot.tensor]
            content = payloads if slot.own is None else self._opened(slot.tensor, payloads)[slot.own]
            contents.append(declare_input(request, slot.field.name, content))
        return written(request, contents)

    def _opened(self, tensor: str, payloads: Sequence[bytes]) -> Mapping[str, Tensor]:
        """Return what was encoded for the way, of a tensor that goes as it is."""
        envelope = self.side.envelopes.get((tensor, self.placement))
        codec = self.side.route.codecs[tensor]
        return codec.decode(payloads if envelope is None else envelope.opened_all(payloads))

    def _asked(self, method: str, request: Any, seconds: float = math.inf) -> tuple[Any, int]:
        def call(left: float) -> Any:
            self.check_open()
            try:
                response = self._stubs[method](request, timeout=left, metadata=self._metadata)
            except grpc.RpcError as error:
                self.check_open()
                code, words = explained(error.code().name, error.details() or "")
                self.breaker.note(code)
                raise ServingError(code, f"{self.address}: {words}") from error
            self.breaker.note("OK")
            return response

        self.breaker.check(self.address)
        if seconds <= 0:
            raise ServingError("DEADLINE_EXCEEDED", f"there was no time left to ask {self.address}")
        return self.retries.run(call, sleep=self._closed.wait, within=seconds)

    def _outcome(self, response: Any, rows: tuple[int, ...]) -> tuple[Outcome, dict[int, CodecError]]:
        """Return an answer as a side's outcome; :class:`ServingError` where it is none."""
        try:
            found = _read(response, self.signature)
            if any(len(value) != len(rows) for value in found.values()):
                raise ValueError("it has another number of samples")
        except (ValueError, KeyError, IndexError) as error:
            raise ServingError("INTERNAL", f"{self.address} gave an answer that cannot be read: {error}") from error
        words = found.pop(ERROR, [b""] * len(rows))
        told = {row: text.decode("utf-8", "replace") for row, text in zip(rows, words, strict=True) if text}
        errors: dict[int, CodecError] = {row: RowError(text) for row, text in told.items()}
        exits = found.pop(EXIT, None)
        results = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        here = [place for place, row in enumerate(rows) if row not in errors and results]
        if exits is not None:
            here = [place for place in here if exits[place] >= 0]
        outcome = Outcome(rows=tuple(rows[place] for place in here))
        if len(here) == len(rows):
            outcome.outputs = results
        elif here:
            places = torch.tensor(here, dtype=torch.int64)
            outcome.outputs = {name: value[places] for name, value in results.items()}
        if exits is not None:
            known = exits.tolist()
            outcome.exits = tuple(known[place] for place in here)
        for crossing in self.signature.crossings:
            payloads = found.get(f"{crossing.tensor}@{crossing.target}")
            if payloads is not None and any(payloads):
                going = [place for place, payload in enumerate(payloads) if payload]
                onward = outcome.messages.setdefault(crossing.target, Message(tuple(rows[i] for i in going), {}))
                onward.payloads[crossing.tensor] = [payloads[i] for i in going]
        return outcome, errors


def _bytes_of(arrived: Message) -> int:
    """Return the bytes of what is sent; what a message has around them is little."""
    return sum(
        value.nbytes if isinstance(value, Tensor) else sum(map(len, value)) for value in arrived.payloads.values()
    )


def _read(response: Any, signature: Signature) -> dict[str, Any]:
    """Return the outputs of an answer, each of which must be one of this bundle's."""
    found: dict[str, Any] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        field = signature.answers[output.name]
        count = field.check(output, MOST_SAMPLES)
        found[output.name] = (
            split(raw, count) if field.datatype == "BYTES" else field.tensor(raw, None, output.shape, count)
        )
    return found


def _joined(parts: Sequence[Outcome]) -> Outcome:
    """Return several outcomes, of parts of a batch, as one."""
    whole = Outcome()
    names = dict.fromkeys(name for part in parts for name in part.outputs)
    whole.outputs = {name: torch.cat([part.outputs[name] for part in parts if name in part.outputs]) for name in names}
    for part in parts:
        whole.rows, whole.exits = (*whole.rows, *part.rows), (*whole.exits, *part.exits)
        for target, onward in part.messages.items():
            known = whole.messages.setdefault(target, Message((), {}))
            payloads = {name: [*known.payloads.get(name, ()), *each] for name, each in onward.payloads.items()}
            whole.messages[target] = Message((*known.rows, *onward.rows), payloads)
    return whole


def checked_host(name: str, address: Any) -> str:
    """Return the host of an address; :class:`ValueError`, which names what it is given as, where it is none."""
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    fits = bare and not any(each.isspace() or each in "/[]" for each in bare) and (bare != host or ":" not in host)
    if not fits or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{name}={address} must be HOST:PORT, such as 127.0.0.1:8001 or [::1]:8001")
    return bare


def _channel(address: str, trust: Trust, signature: Signature) -> grpc.Channel:
    limit = max(USUAL_MESSAGE_BYTES, signature.most_bytes(MOST_SAMPLES))
    options = [
        ("grpc.max_receive_message_length", min(limit, 2**31 - 1)),
        ("grpc.max_send_message_length", -1),
        # Tries are this client's own, and a server that is back is found soon.
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", _LONGEST_PAUSE_MS),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    credentials = trust.channel_credentials()
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)
