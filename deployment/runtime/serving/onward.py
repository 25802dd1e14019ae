"""What a server does with samples that go on to another placement: it is a client of the next server."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...bundle.files import BundleError
from ...codecs.packing import CodecError, PayloadError
from ...naming import did_you_mean, listed
from ..asking.remote import Remote, Sent, checked_host
from ..asking.retrying import Breaker, Retries
from ..side import Outcome
from ..trust import Trust
from ..walk import Message
from ..wire.signatures import ERROR, EXIT, Given, sent_name
from ..wire.status import ServingError
from .models import Answer, Door, Served, going_on


class Onward:
    """The servers of the placements behind this one.

    Args:
        addresses: ``HOST:PORT`` by placement.
        trust: Certificates and token of this client.
        retries: How often and how long they are asked, at most as long as a request has left.

    Raises:
        ValueError: An address is none, or a token would go there in the clear.
    """

    def __init__(
        self, addresses: Mapping[str, str], trust: Trust | None = None, retries: Retries | None = None
    ) -> None:
        for place, address in addresses.items():
            host = checked_host(f"servers.{place}", address)
            (trust or Trust()).check_target(host)
        self.addresses, self.trust, self.retries = dict(addresses), trust, retries or Retries()
        self._breakers = {place: Breaker() for place in addresses}
        self._remotes: dict[tuple[str, str, int | None], Remote] = {}
        self._lock = threading.Lock()

    def check(self, served: Sequence[Served]) -> None:
        """Raise :class:`ValueError` where a placement is on the route of none of the models."""
        places = [place for model in served for place in model.bundle.manifest.route.placements]
        for place, address in self.addresses.items():
            if place not in places:
                known = listed(sorted(set(places)))
                near = did_you_mean(place, places)
                raise ValueError(f"servers.{place}={address} is of no placement of what is served: {known}.{near}")

    def close(self) -> None:
        """Close the connections."""
        for remote in self._remotes.values():
            remote.close()

    def finished(self, model: Served, given: Given, answer: Answer, seconds: float) -> Answer:
        """Return an answer with what the next servers make of the samples that go on to them.

        Args:
            model: What answered.
            given: What it was asked.
            answer: Its answer.
            seconds: How long it may take.

        Raises:
            ServingError: A server gave no answer.
        """
        if not isinstance(model, Door):
            return answer
        outputs = dict(answer.outputs)
        for place in self.addresses:
            message = _message(model, place, outputs)
            if message is not None:
                remote = self._remote(model, place, given.bits)
                _merge(outputs, given.rows, *_asked(remote, message, seconds))
        return dataclasses.replace(answer, outputs=outputs)

    def _remote(self, model: Door, place: str, bits: int | None) -> Remote:
        key = (model.digest, place, bits)
        with self._lock:
            if key not in self._remotes:
                name = model.name.removesuffix(f".{model.spec.name}")
                side = model.at_width(bits)
                arguments = (self.trust, self.retries, self._breakers[place])
                try:
                    self._remotes[key] = Remote(side, place, self.addresses[place], name, bits, *arguments)
                except BundleError as error:
                    raise ServingError("FAILED_PRECONDITION", str(error)) from error
            return self._remotes[key]


def _merge(outputs: dict[str, Any], rows: int, outcome: Outcome, errors: Mapping[int, CodecError]) -> None:
    """Add what another placement has answered."""
    places = torch.tensor(outcome.rows, dtype=torch.int64)
    for name, tensor in outcome.outputs.items():
        known = outputs.get(name)
        if not isinstance(known, Tensor):
            known = tensor.new_full((rows, *tensor.shape[1:]), torch.nan if tensor.is_floating_point() else 0)
        outputs[name] = known.index_copy(0, places, tensor)
    if outcome.exits:
        known = outputs.get(EXIT, torch.full((rows,), -1, dtype=torch.int64))
        outputs[EXIT] = known.index_copy(0, places, torch.tensor(outcome.exits, dtype=torch.int64))
    if errors:
        words = list(outputs.get(ERROR, [b""] * rows))
        for row, error in errors.items():
            words[row] = str(error).encode("utf-8", "replace")[:1000]
        outputs[ERROR] = words
    outputs.update(going_on(outcome, rows))


def _message(model: Door, place: str, outputs: dict[str, Any]) -> Message | None:
    """Take what goes to a placement out of an answer."""
    going = [each for each in model.signature.leaving if each.target == place]
    found = {each.tensor: outputs.pop(sent_name(each.tensor, place), None) for each in going}
    sent = {tensor: payloads for tensor, payloads in found.items() if payloads is not None}
    if not sent:
        return None
    rows = tuple(row for row, payload in enumerate(next(iter(sent.values()))) if payload)
    return Message(rows, {tensor: [payloads[row] for row in rows] for tensor, payloads in sent.items()})


def _asked(remote: Remote, message: Message, seconds: float) -> tuple[Outcome, dict[int, CodecError]]:
    try:
        return remote.run(message, Sent(), seconds), {}
    except PayloadError as error:
        return error.outcome, error.errors
    except BundleError as error:
        raise ServingError("FAILED_PRECONDITION", str(error)) from error
