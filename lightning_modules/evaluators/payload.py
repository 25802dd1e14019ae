"""The bytes that a network sends, in testing."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from cleave.architectures import StagedNetwork
from cleave.architectures.inserts.finite import DEAD
from cleave.deployment import zstd_bytes
from cleave.lightning_modules.evaluators.evaluator import TEST, Evaluator, Measured, Width
from cleave.lightning_modules.testing import Passed, all_widths


class PayloadBytes(Evaluator):
    """Mean bytes of a sample's payloads as they are sent, and after zstd level 1, summed over all bottlenecks.

    The envelope in front of each is counted, if the network sends one.

    Their ratio to the uint8 input, to the float32 feature at the cut where there is one cut, and to the image file is
    below 1 where fewer bytes are sent. Under a learned prior also ``estimated_bytes``, what the prior predicts for the
    bitstream; with several bottlenecks ``payload_bytes/LAYER`` of each; of a network of several widths
    ``bits4/payload_bytes`` of each.
    """

    every_width = True

    def __init__(self) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict({"payload_bytes": MeanMetric(), "payload_zstd_bytes": MeanMetric()})
        self.by_cut = nn.ModuleList()
        self.by_width = nn.ModuleDict()
        self.cuts: tuple[str, ...] = ()
        self.bits: int | None = None
        self.sizes: dict[str, float] = {}
        self.firsts: dict[str, bytes] = {}
        self.alive: set[str] = set()

    def bind(self, network: StagedNetwork, trained: Sequence[str]) -> None:
        """Build the metrics of each bottleneck and width.

        Raises:
            ValueError: The network sends nothing.
        """
        if not network.bottlenecks:
            raise ValueError(
                "PayloadBytes measures what a bottleneck sends, of which this network has none; set split.at"
            )
        self.cuts = tuple(network.bottlenecks)
        self.bits = network.bits()
        if any(bottleneck.has_prior for bottleneck in network.bottlenecks.values()):
            self.metrics["estimated_bytes"] = MeanMetric()
        if len(self.cuts) > 1:
            self.by_cut = nn.ModuleList(MeanMetric() for _ in self.cuts)
        for bits in all_widths(network):
            self.by_width[str(bits)] = MeanMetric()

    def start(self, stage: str, network: StagedNetwork, data: Any) -> None:
        """Begin an evaluation."""
        super().start(stage, network, data)
        if stage != TEST:
            return
        self.bits, self.firsts, self.alive = network.bits(), {}, set()
        sizes = network.sizes(self.cuts[0])
        self.sizes = {name: float(size) for name, size in sizes.items() if name != "feature" or len(self.cuts) == 1}
        if hasattr(data, "image_file_bytes"):
            self.sizes["file"] = data.image_file_bytes("test")

    def needs(self, stage: str, network: StagedNetwork) -> Sequence[str]:
        """Return what stands behind every bottleneck in testing, so that all of them send."""
        return [f"{cut}/sent" for cut in network.bottlenecks] if stage == TEST else ()

    def update(self, stage: str, passed: Passed) -> None:
        """Add a batch."""
        if stage != TEST:
            return
        lengths = [_lengths(payloads, passed) for payloads in passed.payloads.values()]
        total = torch.stack(lengths).sum(0)
        if str(passed.bits) in self.by_width:
            cast(MeanMetric, self.by_width[str(passed.bits)]).update(total)
        if not passed.chosen:
            return
        cast(MeanMetric, self.metrics["payload_bytes"]).update(total)
        for cut, payloads in passed.payloads.items():
            first = self.firsts.setdefault(cut, payloads[0])
            if any(payload != first for payload in payloads):
                self.alive.add(cut)
        compressed = [_lengths(payloads, passed, zstd_bytes) for payloads in passed.payloads.values()]
        cast(MeanMetric, self.metrics["payload_zstd_bytes"]).update(torch.stack(compressed).sum(0))
        for metric, length in zip(self.by_cut, lengths, strict=bool(len(self.by_cut))):
            cast(MeanMetric, metric).update(length)
        if "estimated_bytes" in self.metrics:
            cast(MeanMetric, self.metrics["estimated_bytes"]).update(_estimated(passed))

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return what was measured."""
        if stage != TEST:
            return {}
        if cast(MeanMetric, self.metrics["payload_bytes"]).weight > 1:
            for cut in self.firsts.keys() - self.alive:
                warnings.warn(f"{cut}: all representations of the test images are equal: {DEAD}", stacklevel=2)
        found = {name: cast(MeanMetric, metric).compute() for name, metric in self.metrics.items()}
        found |= {f"payload_to_{name}": found["payload_bytes"] / size for name, size in self.sizes.items()}
        for cut, metric in zip(self.cuts, self.by_cut, strict=bool(len(self.by_cut))):
            found[f"payload_bytes/{cut}"] = cast(MeanMetric, metric).compute()
        for bits, metric in self.by_width.items():
            found[f"bits{bits}/payload_bytes"] = cast(MeanMetric, metric).compute()
        return found

    def report(self, values: Mapping[str, float], measured: Measured) -> Measured:
        """Fill in the bytes, at each width too."""
        if "payload_bytes" not in values:
            return measured
        total, zstd, accuracy = values["payload_bytes"], values.get("payload_zstd_bytes"), values.get("acc")
        by_width = {int(bits): values[f"bits{bits}/payload_bytes"] for bits in self.by_width}
        widths = [
            Width(bits, values.get(f"bits{bits}/acc"), sent, zstd if bits == self.bits else None)
            for bits, sent in by_width.items()
        ]
        if self.bits not in by_width:
            widths.append(Width(self.bits, accuracy, total, zstd))
        cuts = {cut: values.get(f"payload_bytes/{cut}", total) for cut in self.cuts}
        return dataclasses.replace(measured, widths=tuple(widths), payload_bytes=cuts)


def _lengths(payloads: Sequence[bytes], passed: Passed, length: Callable[[bytes], int] = len) -> Tensor:
    device = next(iter(passed.outputs.values())).device
    return torch.tensor([float(length(payload) + passed.envelope_bytes) for payload in payloads], device=device)


def _estimated(passed: Passed) -> Tensor:
    """Return the bytes of each sample that the learned priors predict."""
    found = []
    for cut, bottleneck in passed.network.bottlenecks.items():
        if bottleneck.has_prior:
            found.append(bottleneck.quantizer.estimated_bits(passed.sent[cut]["codes"]) / 8)  # type: ignore[operator]
    return torch.stack(found).sum(0)
