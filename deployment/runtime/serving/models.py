"""Served models: the door of a placement, through which requests of our client come, and its partitions alone."""

from __future__ import annotations

import abc
import dataclasses
import math
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...bundle.edges import Crossing
from ...bundle.files import BundleError
from ...bundle.loading import Bundle
from ...bundle.specs import PartitionSpec
from ...codecs.packing import CodecError, PayloadError
from ..side import Outcome, Side, _Running
from ..walk import Message
from ..wire.signatures import ERROR, EXIT, Given, Signature, only_visit, read_inputs, sent_name
from ..wire.status import ServingError, invalid
from ..wire.tensors import Field

# PyTorch profiles the first run of a shape and compiles in the second.
_WARM_UPS = 2


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one request is answered: tensors, and lists of a byte string for each sample, by name.

    Args:
        outputs: As above.
        seconds: Seconds of computing, of the whole batch that the request was a part of.
        batch: Samples of that batch.
    """

    outputs: dict[str, Tensor | list[bytes]]
    seconds: float = 0.0
    batch: int = 0


class Served(abc.ABC):
    """One model of a server.

    Args:
        bundle: The bundle, of which the placement was loaded.
        name: The model's name: ``BUNDLE.PARTITION``.
        version: Its version.
        spec: The partition.
        most: Most samples of a request.

    Attributes:
        inputs: All that it takes, by name.
        outputs: All that it may answer by itself, by name.
        answers: All that may be answered with the help of others.
    """

    inputs: Mapping[str, Field]
    outputs: Mapping[str, Field]
    answers: Mapping[str, Field]

    def __init__(self, bundle: Bundle, name: str, version: int, spec: PartitionSpec, most: int) -> None:
        self.bundle, self.name, self.version, self.spec, self.most = bundle, name, version, spec, most
        self._sides: dict[int | None, Any] = {}
        self._lock = threading.Lock()

    @property
    def digest(self) -> str:
        """The digest of the bundle's manifest."""
        return self.bundle.manifest.digest

    @property
    def properties(self) -> dict[str, str]:
        """What a client should know before it sends anything."""
        versions = self.bundle.manifest.versions
        known = {"digest": self.digest, "placement": self.spec.placement, "partition": self.spec.name}
        return {**known, "max_batch_size": str(self.most), **{f"version.{key}": str(versions[key]) for key in versions}}

    def most_bytes(self) -> int:
        """Most bytes of a request, or of an answer."""
        return max(sum(field.most_bytes(self.most) for field in each.values()) for each in (self.inputs, self.answers))

    @abc.abstractmethod
    def read(self, request: Any) -> Given:
        """Read a request; :class:`ServingError` where it is not what this model takes."""

    @abc.abstractmethod
    def run(self, given: Sequence[Given]) -> list[Answer | ServingError]:
        """Answer requests that go together, see :meth:`key`, as one batch."""

    def key(self, given: Given) -> tuple[Any, ...]:
        """Return what two requests must share to be computed together."""
        found: list[Any] = [given.bits]
        for tensor, value in sorted(given.payloads.items()):
            parts = value if isinstance(value, dict) else {"": value}
            shapes = [(own, x.shape[1:] if isinstance(x, Tensor) else None) for own, x in sorted(parts.items())]
            found.append((tensor, *shapes))
        return tuple(found)

    def at_width(self, bits: int | None) -> Any:
        """Return what computes at a width, made at its first use; ServingError where there is none."""
        with self._lock:
            if bits not in self._sides:
                try:
                    self._sides[bits] = self._made(bits)
                except (CodecError, BundleError) as error:
                    raise invalid(f"bits={bits}: {error}") from error
            return self._sides[bits]

    @abc.abstractmethod
    def _made(self, bits: int | None) -> Any:
        """Make what computes at a width."""


class Door(Served):
    """The first partition of a placement: who asks for it is led through all of them, as far as the exits let them."""

    def __init__(self, bundle: Bundle, name: str, version: int, spec: PartitionSpec, most: int) -> None:
        super().__init__(bundle, name, version, spec, most)
        only_visit(bundle.manifest, spec.placement)
        self.signature = Signature(bundle.manifest, spec.placement)
        self.inputs, self.outputs, self.answers = self.signature.inputs, self.signature.outputs, self.signature.answers
        self.results = [name for name in self.outputs if name not in (EXIT, ERROR) and "@" not in name]
        self.at_width(None)

    def read(self, request: Any) -> Given:
        """Read a request by payloads or by tensors."""
        given = self.signature.read(request, self.most)
        self.signature.complete(given.payloads, self.at_width(given.bits).route.codecs, given.rows)
        return given

    def run(self, given: Sequence[Given]) -> list[Answer | ServingError]:
        """Run the placement on a batch; a sample that fails fails alone."""
        rows = sum(each.rows for each in given)
        tensors = {tensor: _together([each.payloads[tensor] for each in given]) for tensor in given[0].payloads}
        side, errors = self.at_width(given[0].bits), {}
        try:
            outcome = side.run(Message(tuple(range(rows)), tensors), request=object())
        except PayloadError as error:
            outcome, errors = error.outcome, error.errors
        whole = self._whole(outcome, rows)
        answers: list[Answer | ServingError] = []
        start = 0
        for each in given:
            end = start + each.rows
            failed = {row - start: errors[row] for row in errors if start <= row < end}
            answers.append(self._answer({name: x[start:end] for name, x in whole.items()}, each.rows, failed))
            start = end
        return answers

    def _whole(self, outcome: Outcome, rows: int) -> dict[str, Any]:
        """Return what came out for all samples: NaN or 0, exit -1 and no bytes for those who were not answered here."""
        found: dict[str, Any] = {}
        everyone = outcome.rows == tuple(range(rows))
        places = torch.tensor(outcome.rows, dtype=torch.int64)
        for name, tensor in outcome.outputs.items():
            if everyone:
                found[name] = tensor
                continue
            nothing = math.nan if tensor.is_floating_point() else 0
            found[name] = tensor.new_full((rows, *tensor.shape[1:]), nothing)
            found[name][places] = tensor
        if EXIT in self.outputs:
            found[EXIT] = torch.full((rows,), -1, dtype=torch.int64)
            found[EXIT][places] = torch.tensor(outcome.exits, dtype=torch.int64)
        return found | going_on(outcome, rows)

    def _answer(self, outputs: dict[str, Any], rows: int, failed: Mapping[int, CodecError]) -> Answer | ServingError:
        if len(failed) == rows:
            row, error = next(iter(failed.items()))
            return invalid(_of_row(error, row))
        if failed:
            words = (_of_row(failed[row], row) if row in failed else "" for row in range(rows))
            outputs = {**outputs, ERROR: [text.encode("utf-8", "replace") for text in words]}
        return Answer(outputs)

    def _made(self, bits: int | None) -> Side:
        return _Side(self.bundle, self.spec.placement, bits)


class Alone(Served):
    """One partition by itself: its inputs in, its outputs out. No exit decides, and nothing is decoded or encoded."""

    def __init__(self, bundle: Bundle, name: str, version: int, spec: PartitionSpec, most: int) -> None:
        super().__init__(bundle, name, version, spec, most)
        supplied = bundle.manifest.route.supplied
        self.inputs = {item.name: Field.of(item) for item in spec.inputs if item.name not in supplied}
        self.outputs = self.answers = {item.name: Field.of(item) for item in spec.outputs}

    def read(self, request: Any) -> Given:
        """Read a request by tensors."""
        values = read_inputs(request, self.inputs, list(self.inputs), self.most)
        if len({len(value) for value in values.values()}) != 1:
            raise invalid("all inputs must have as many samples")
        return Given(len(next(iter(values.values()))), values)

    def run(self, given: Sequence[Given]) -> list[Answer | ServingError]:
        """Run the partition on a batch."""
        rows, route = sum(each.rows for each in given), self.bundle.manifest.route
        tensors = {name: _together([each.payloads[name] for each in given]) for name in given[0].payloads}
        tensors |= {draw.name: draw.fresh(rows) for draw in route.draws if draw.name not in tensors}
        outputs = self.bundle.partitions[self.spec.name]({**route.settings, **tensors})
        answers: list[Answer | ServingError] = []
        start = 0
        for each in given:
            answers.append(Answer({name: x[start : start + each.rows].cpu() for name, x in outputs.items()}))
            start += each.rows
        return answers

    def _made(self, bits: int | None) -> None:
        return None


def going_on(outcome: Outcome, rows: int) -> dict[str, list[bytes]]:
    """Return what goes on to other placements, by the names that answers have for it; no bytes of who does not."""
    found = {}
    for target, message in outcome.messages.items():
        for tensor, payloads in message.payloads.items():
            sent = [b""] * rows
            for row, payload in zip(message.rows, payloads, strict=True):
                sent[row] = payload
            found[sent_name(tensor, target)] = sent
    return found


def _of_row(error: CodecError, row: int) -> str:
    """Say what is wrong with a sample, by its place in its own request."""
    return re.sub(r"\b(payload|sample) \d+\b", rf"\1 {row}", str(error), count=1)[:1000]


def _together(values: Sequence[Any]) -> Any:
    """Return what several requests give for a tensor as one batch."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], dict):
        return {own: torch.cat([each[own] for each in values]) for own in values[0]}
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [payload for each in values for payload in each]


class _Side(Side):
    """A side that also takes tensors that never were bytes."""

    def __init__(self, bundle: Bundle, placement: str, bits: int | None) -> None:
        super().__init__(bundle, placement, bits)
        self._walk = _Taking(self)


class _Taking(_Running):
    def receive(self, crossing: Crossing, payload: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        return dict(payload) if isinstance(payload, Mapping) else super().receive(crossing, payload, rows)


def models_of(bundle: Bundle, name: str, version: int, placement: str, most: int) -> list[Served]:
    """Return the models of a placement, tested and warmed up at each size of batch up to ``most``.

    Raises:
        BundleError: The bundle lacks the placement, it cannot be served, or it fails its own test.
    """
    specs = bundle.manifest.at(placement)
    bundle.self_test()
    sample = bundle.samples[placement]
    for rows in range(1, most + 1):
        batch = {key: _repeated(tensor, rows) for key, tensor in sample.items()}
        for spec in specs:
            for _ in range(_WARM_UPS):
                bundle.partitions[spec.name]({**bundle.manifest.route.settings, **batch})
    first, *others = specs
    found: list[Served] = [Door(bundle, f"{name}.{first.name}", version, first, most)]
    return found + [Alone(bundle, f"{name}.{spec.name}", version, spec, most) for spec in others]


def _repeated(tensor: Tensor, rows: int) -> Tensor:
    return tensor[torch.arange(rows) % len(tensor)]
