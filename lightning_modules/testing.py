"""A batch's way through a network in evaluation, over real bytes wherever something is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from cleave.architectures import StagedNetwork
from cleave.deployment import ENVELOPE_BYTES, Codec


@dataclasses.dataclass(frozen=True)
class Passed:
    """What a batch became on one way through a network.

    Args:
        network: The network, in eval mode.
        batch: The batch by its parts, such as ``labels``.
        outputs: The outputs that evaluators need, by name.
        payloads: The bytes of every sample by the bottleneck that sent them, without an envelope; empty where nothing
            went through bytes.
        sent: The tensors that the payloads were made of, by bottleneck.
        bits: The width of the codes, where the network knows several.
        chosen: Whether that is the width that the network is set to.
    """

    network: StagedNetwork
    batch: Mapping[str, Any]
    outputs: Mapping[str, Tensor]
    payloads: Mapping[str, list[bytes]] = dataclasses.field(default_factory=dict)
    sent: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    bits: int | None = None
    chosen: bool = True

    @property
    def envelope_bytes(self) -> int:
        """Bytes that go in front of each payload once it is sent: a bundle's envelope, or nothing."""
        return ENVELOPE_BYTES if self.network.envelope else 0

    def __getitem__(self, name: str) -> Tensor:
        """Return an output, or a part of the batch."""
        return self.outputs[name] if name in self.outputs else self.batch[name]


class Bytes:
    """The link of a test: it encodes what a bottleneck sends, decodes the bytes, and keeps both."""

    def __init__(self) -> None:
        self.payloads: dict[str, list[bytes]] = {}
        self.sent: dict[str, Mapping[str, Tensor]] = {}

    def __call__(self, cut: str, codec: Codec, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what the other side is delivered."""
        self.payloads[cut], self.sent[cut] = codec.encode(tensors), tensors
        return codec.decode(self.payloads[cut])


def all_widths(network: StagedNetwork) -> tuple[int, ...]:
    """Return the widths in bits that some bottleneck of a network knows beside others."""
    return tuple(sorted({bits for widths in network.widths.values() for bits in widths}))


def through_bytes(
    network: StagedNetwork,
    batch: Mapping[str, Any],
    inputs: Tensor,
    names: Sequence[str],
    chosen: Mapping[str, int],
) -> Iterator[Passed]:
    """Send a batch through a network, once for every width that it knows.

    The first encoder and all before it run once, what stands behind them once a width.

    Args:
        network: The network, in eval mode; afterwards it is set to the chosen widths.
        batch: The batch by its parts.
        inputs: What the network runs on.
        names: The outputs that are needed.
        chosen: The width that each bottleneck of several is set to; it comes last.
    """
    if not chosen:
        yield _pass(network, batch, inputs, names, {}, None)
        return
    first = next(iter(network.bottlenecks))
    fixed = network.frontier(names, [f"quantizer/{first}", f"decoder/{first}"])
    # A prior rounds without a part of its own, yet nothing that was sent may be given.
    quantised = f"{first}/{network.bottlenecks[first].quantised}"
    before = [quantised if name == f"{first}/sent" else name for name in fixed if name != "images"]
    given = network.outputs(inputs, before)
    last = next(iter(chosen.values()))
    for bits in [*(width for width in all_widths(network) if width != last), last]:
        for cut, own in chosen.items():
            network.set_bits(bits if bits in network.widths[cut] else own, cut)
        if bits == last:
            set_widths(network, chosen)
        yield dataclasses.replace(_pass(network, batch, inputs, names, given, bits), chosen=bits == last)


def _pass(
    network: StagedNetwork,
    batch: Mapping[str, Any],
    inputs: Tensor,
    names: Sequence[str],
    given: Mapping[str, Tensor],
    bits: int | None,
) -> Passed:
    link = Bytes()
    outputs = network.outputs(inputs, names, given=given, link=link if network.bottlenecks else None)
    return Passed(network, batch, outputs, link.payloads, link.sent, bits)


def set_widths(network: StagedNetwork, chosen: Mapping[str, int]) -> None:
    """Set every bottleneck that knows several widths to its own."""
    for cut, bits in chosen.items():
        network.set_bits(bits, cut)
