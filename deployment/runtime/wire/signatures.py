"""What a placement takes from a request and answers: payloads as our client sends them, or tensors from any client."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...bundle.edges import Crossing
from ...bundle.envelope import ENVELOPE_BYTES
from ...bundle.files import BundleError
from ...bundle.manifest import Manifest
from ...bundle.route import Route
from ...bundle.specs import TensorSpec
from ...codecs.codec import Codec
from ...codecs.uniform import usable_range
from ...exits.specs import LOGITS, exit_logits, state_crossings
from ...naming import did_you_mean, listed
from ..walk import Message, Visit, Walk, follow
from .protocol import parameter
from .status import ServingError, invalid
from .tensors import BYTES, Field

PAYLOAD, BEFORE, LEVELS, EXIT, ERROR = "payload", "before", "levels", "exit", "error"
_MOST_MICROSECONDS = 2**53


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where an input of a request goes.

    Args:
        field: The input.
        tensor: The tensor of the route, or the network's input.
        own: The codec's name of this part of it; ``None`` for a payload, or the network's input.
        optional: Whether it may be missing.
    """

    field: Field
    tensor: str
    own: str | None = None
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Given:
    """What a request holds, read and checked.

    Args:
        rows: How many samples.
        payloads: By tensor: a payload for each sample, the codec's tensors by its own names, or the network's input.
        bits: The width that was asked for, if any.
        timeout: Seconds that it may take from its arrival on, if it says so.
    """

    rows: int
    payloads: dict[str, Any]
    bits: int | None = None
    timeout: float | None = None


def only_visit(manifest: Manifest, placement: str) -> None:
    """Raise :class:`BundleError` unless all that comes to a placement about one request comes in one message."""
    counts = _visits(manifest.route)
    if counts[placement] == 1:
        return
    others = [place for place, count in counts.items() if count == 1]
    way = (
        f"serve {' or '.join(others)} instead, and let {placement} call it" if others else "run the bundle by Pipeline"
    )
    raise BundleError(
        f"{placement} is entered {counts[placement]} times for one request, and a server keeps nothing between "
        f"requests; {way}"
    )


def _visits(route: Route) -> dict[str, int]:
    """Return how many messages come to each placement about one request."""
    walks = {each: _Dry(route, each) for each in route.placements}
    visits = {each: Visit() for each in walks}
    counts = dict.fromkeys(walks, 0)

    def step(each: str, message: Message) -> dict[str, Message]:
        counts[each] += 1
        return walks[each].step(visits[each], message)

    steps = {each: (lambda message, each=each: step(each, message)) for each in walks}
    follow(steps, route.entry, Message((0,), {route.input: torch.zeros(1)}))
    return counts


class _Dry(Walk):
    """A walk that computes nothing."""

    def run(self, name: str, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        return {each: torch.zeros(1) for each in self.route.by_name[name].outputs}

    def send(self, crossing: Crossing, tensors: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        return {own: torch.zeros(1) for own in crossing.codec.delivers}

    def receive(self, crossing: Crossing, payload: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        return dict(payload)


class Signature:
    """Both ways to ask a placement of a bundle.

    Args:
        manifest: The bundle's manifest.
        placement: The placement.

    Attributes:
        main: The tensor whose payload is the input ``payload``, if anything is sent here.
        inputs: All inputs by name, of both ways.
        outputs: All that may be answered.
        crossings: All that is sent anywhere on the route.
        answers: All that an answer may hold where other placements have had a part in it.
    """

    def __init__(self, manifest: Manifest, placement: str) -> None:
        self.manifest, self.placement, route = manifest, placement, manifest.route
        states = state_crossings(manifest.policy, manifest.exits, len(manifest.class_names), route)
        self.crossings = [*route.crossings, *states]
        self.coming = [each for each in self.crossings if each.target == placement]
        self.leaving = [each for each in self.crossings if each.source == placement]
        self.specs = {item.name: item for spec in manifest.at(placement) for item in spec.inputs}
        before = [each for each in self.coming if each.tensor in exit_logits(manifest.exits)]
        rest = [each for each in self.coming if each not in before and each.state is None]
        self.main = next(iter([*rest, *before]), None)
        self.before = next((each for each in before if each is not self.main and each.codec.whole), None)
        self.entry = route.input if placement == route.entry else None
        self.by_payload = self._entry_slots() + [self._payload_slot(each) for each in self.coming]
        self.by_tensors = self._entry_slots() + [slot for each in self.coming for slot in self._tensor_slots(each)]
        slots = [*self.by_payload, *self.by_tensors]
        self.inputs = {slot.field.name: slot.field for slot in slots}
        if self.main is not None and self.main.codec.levels:
            self.inputs[LEVELS] = Field(LEVELS, "INT64", (1,))
        self.outputs = self._outputs([placement])
        self.answers = self._outputs(route.placements)

    def _entry_slots(self) -> list[Slot]:
        return [] if self.entry is None else [Slot(Field.of(self.specs[self.entry]), self.entry)]

    def _payload_slot(self, crossing: Crossing) -> Slot:
        if crossing is self.before:
            return Slot(Field(BEFORE, "FP32", (-1, *crossing.codec.shape)), crossing.tensor, crossing.codec.delivers[0])
        name = PAYLOAD if crossing is self.main else crossing.tensor
        return Slot(Field(name, BYTES, (-1,), longest_payload(crossing)), crossing.tensor)

    def _tensor_slots(self, crossing: Crossing) -> list[Slot]:
        codec = crossing.codec
        if crossing is self.before or crossing.state is not None:
            name = BEFORE if crossing is self.before else crossing.tensor
            return [Slot(Field(name, "FP32", (-1, *codec.shape)), crossing.tensor, codec.delivers[0])]
        shared = _shared_range(codec) is not None
        found = []
        for own, name in codec.delivered(crossing.tensor).items():
            if name in self.specs and name not in self.manifest.route.settings:
                spec: TensorSpec = self.specs[name]
                called = own if crossing is self.main else name
                optional = shared and own in ("low", "high")
                found.append(Slot(Field.of(spec, called), crossing.tensor, own, optional))
        return found

    def _outputs(self, placements: Sequence[str]) -> dict[str, Field]:
        specs = [spec for place in placements for spec in self.manifest.at(place)]
        emitted = {item.name: item for spec in specs for item in spec.outputs}
        found = {each.name: Field.of(emitted[each.name]) for each in self.manifest.outputs if each.name in emitted}
        here = [each for each in self.manifest.exit_placements if each in placements]
        if here and (self.manifest.policy is not None or LOGITS in found):
            found[LOGITS] = Field(LOGITS, "FP32", (-1, len(self.manifest.class_names)))
            found[EXIT] = Field(EXIT, "INT64", (-1,))
        for crossing in (each for each in self.crossings if each.source in placements):
            name = sent_name(crossing.tensor, crossing.target)
            found[name] = Field(name, BYTES, (-1,), longest_payload(crossing))
        return {**found, ERROR: Field(ERROR, BYTES, (-1,), 4096)}

    def most_bytes(self, samples: int) -> int:
        """Most bytes that a request of some samples takes, or an answer to it."""
        return max(
            sum(field.most_bytes(samples) for field in fields.values()) for fields in (self.inputs, self.answers)
        )

    def read(self, request: Any, most: int) -> Given:
        """Read a request.

        Args:
            request: A ``ModelInferRequest``.
            most: Most samples that it may have.

        Raises:
            ServingError: It is not what this placement takes; the message says what is wrong.
        """
        names = [tensor.name for tensor in request.inputs]
        slots = self.by_payload if PAYLOAD in names else self.by_tensors
        wanted = {slot.field.name: slot for slot in slots}
        fields = {name: slot.field for name, slot in wanted.items()}
        if slots is self.by_tensors and LEVELS in self.inputs:
            fields[LEVELS] = self.inputs[LEVELS]
        needed = [name for name, slot in wanted.items() if not slot.optional]
        if unknown := [name for name in names if name not in self.inputs]:
            raise unknown_input(unknown[0], self.inputs)
        values = read_inputs(request, fields, needed, most)
        levels = values.pop(LEVELS, None)
        bits = _bits(request, levels)
        payloads: dict[str, Any] = {}
        for name, value in values.items():
            slot = wanted[name]
            if slot.own is None:
                payloads[slot.tensor] = value
            else:
                payloads.setdefault(slot.tensor, {})[slot.own] = value
        rows = {len(value) for value in values.values()}
        if len(rows) != 1:
            counts = ", ".join(f"{name} {len(value)}" for name, value in values.items())
            raise invalid(f"all inputs must have as many samples, got {counts}")
        return Given(rows.pop(), payloads, bits, _timeout(request))

    def complete(self, payloads: dict[str, Any], codecs: Mapping[str, Codec], rows: int) -> None:
        """Check tensors that came without a codec, and add the range that all samples share.

        Raises:
            ServingError: Codes do not fit the width, or a range is none.
        """
        for tensor, parts in payloads.items():
            if not isinstance(parts, dict) or tensor not in codecs:
                continue
            codec = codecs[tensor]
            for own, value in (_shared_range(codec) or {}).items():
                if f"{tensor}.{own}" in self.specs and own not in parts:
                    parts[own] = torch.full((rows,), value, dtype=torch.float32)
            if codec.levels and "codes" in parts:
                least, largest = (int(value) for value in torch.aminmax(parts["codes"]))
                if least < 0 or largest >= codec.levels:
                    raise invalid(f"codes must be 0 to {codec.levels - 1}, got {least} to {largest}")
            low, high = parts.get("low"), parts.get("high")
            if low is not None and high is not None:
                for a, b in zip(low.tolist(), high.tolist(), strict=True):
                    if not (usable_range(a, b) and a <= b):
                        raise invalid(f"low and high must be finite and rise, got {a} and {b}")


def read_inputs(request: Any, fields: Mapping[str, Field], needed: Sequence[str], most: int) -> dict[str, Any]:
    """Read the inputs of a request: tensors, and lists of byte strings.

    Raises:
        ServingError: One is unknown, missing, given twice, or not what it must be.
    """
    names = [tensor.name for tensor in request.inputs]
    if unknown := [name for name in names if name not in fields]:
        raise unknown_input(unknown[0], fields)
    if len(set(names)) != len(names):
        raise invalid(f"an input is given twice, got {listed(names)}")
    if missing := [name for name in needed if name not in names]:
        raise invalid(f"the request lacks {listed(missing)}; given are {listed(names) or 'none'}")
    raws = request.raw_input_contents
    if raws and len(raws) != len(names):
        raise invalid(f"raw_input_contents must hold all {len(names)} inputs or none, got {len(raws)}")
    found: dict[str, Any] = {}
    # Everything is checked before anything is read: no memory is taken for a request that is refused.
    counts = [fields[tensor.name].check(tensor, most) for tensor in request.inputs]
    for index, (tensor, count) in enumerate(zip(request.inputs, counts, strict=True)):
        if raws and tensor.HasField("contents"):
            raise invalid(f"{tensor.name} is given twice, by raw_input_contents and by contents; use one of them")
        field, raw = fields[tensor.name], raws[index] if raws else None
        if field.datatype == BYTES:
            found[tensor.name] = field.texts(raw, tensor.contents, count)
        else:
            found[tensor.name] = field.tensor(raw, tensor.contents, tensor.shape, count)
    return found


def unknown_input(name: str, known: Mapping[str, Field]) -> ServingError:
    """Return the error of an input that nothing takes, or nothing together with the others."""
    near = did_you_mean(name, known)
    return invalid(f"there is no input {name!r:.100} here; it takes {listed(list(known))}.{near}")


def longest_payload(crossing: Crossing) -> int:
    """Most bytes that a payload may have: no coding makes more than 4 bytes of a number, and some in front."""
    return math.prod(crossing.codec.shape) * 4 * 65 // 64 + 4096 + ENVELOPE_BYTES


def _shared_range(codec: Codec) -> dict[str, float] | None:
    """Return the range that all samples share, if they share one."""
    inner = getattr(codec, "inner", codec)
    low, high = getattr(inner, "low", None), getattr(inner, "high", None)
    return None if low is None or high is None else {"low": low, "high": high}


def sent_name(tensor: str, target: str) -> str:
    """Return the name under which an answer holds what goes on to another placement."""
    return f"{tensor}@{target}"


def _bits(request: Any, levels: Tensor | None) -> int | None:
    """Return the width that a request asks for, by its parameter ``bits`` or its input ``levels``."""
    bits = parameter(request.parameters["bits"]) if "bits" in request.parameters else None
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int)):
        raise invalid(f"the parameter bits must be a whole number, got {bits!r:.40}")
    if levels is None:
        return bits
    (number,) = levels.tolist()
    found = number.bit_length() - 1
    if number < 4 or number != 1 << found or (bits is not None and bits != found):
        raise invalid(f"levels must be 2 to the power of the bits, got {number} with bits={bits}")
    return found


def _timeout(request: Any) -> float | None:
    """Return the seconds that a request's parameter ``timeout`` allows it, which it states in microseconds."""
    found = parameter(request.parameters["timeout"]) if "timeout" in request.parameters else None
    if found is None or found == 0:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not 0 < found <= _MOST_MICROSECONDS:
        raise invalid(f"the parameter timeout must be microseconds, a whole number, got {found!r:.40}")
    return found / 1e6
