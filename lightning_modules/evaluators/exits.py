"""Metrics of early exits, and of the policy that decides there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from cleave.architectures import StagedNetwork
from cleave.deployment import ExitPolicy, offline
from cleave.lightning_modules.evaluators.answers import Answers
from cleave.lightning_modules.evaluators.classification import CalibrationError
from cleave.lightning_modules.evaluators.evaluator import TEST, VAL, Evaluator, Measured, PolicyFigures
from cleave.lightning_modules.testing import Passed


class Exits(Evaluator):
    """Accuracy ``acc_exit/NAME`` and calibration error ``ece_exit/NAME`` of every exit, and ``acc_exits``, their mean.

    Where an ensemble is trained, in validation also ``acc_own/NAME``, what the exit answers without it.

    Args:
        answers: What the exits answer.
        labels: The part of a batch that holds the labels (B,).
    """

    shown = ("acc_exits",)

    def __init__(self, answers: Answers | None = None, labels: str = "labels") -> None:
        super().__init__()
        self.answers = answers or Answers()
        self.labels = labels
        self.names: tuple[str, ...] = ()
        self.metrics = nn.ModuleList()
        self.own = nn.ModuleList()

    def bind(self, network: StagedNetwork, trained: Sequence[str]) -> None:
        """Build the metrics of each exit."""
        self.answers.bind(network, trained)
        self.names = network.exits
        (classes,) = network.shapes["logits"]
        self.metrics = nn.ModuleList(
            nn.ModuleDict(
                {"acc": MulticlassAccuracy(classes, average="micro"), "ece": CalibrationError(classes, n_bins=15)}
            )
            for _ in self.names
        )
        if self.answers.trains_ensemble:
            self.own = nn.ModuleList(MulticlassAccuracy(classes, average="micro") for _ in self.names)

    def monitor(self, trained: Sequence[str]) -> str | None:
        """Return the mean accuracy where exits or their ensemble are trained."""
        return "val/acc_exits" if any(part.partition("/")[0] in ("exits", "ensemble") for part in trained) else None

    def start(self, stage: str, network: StagedNetwork, data: Any) -> None:
        """Begin an evaluation."""
        super().start(stage, network, data)
        self.answers.start(network)

    def needs(self, stage: str, network: StagedNetwork) -> Sequence[str]:
        """Return the outputs that the answers are made of."""
        own = network.group("exits") if stage == VAL and len(self.own) else ()
        return tuple(dict.fromkeys([*self.answers.needs(stage, network), *own]))

    def update(self, stage: str, passed: Passed) -> None:
        """Add a batch."""
        labels = passed.batch[self.labels]
        if stage == VAL and len(self.own):
            for alone, name in zip(self.own, passed.network.group("exits"), strict=True):
                cast(Metric, alone).update(passed[name].float(), labels)
        for group, logits in zip(self.metrics, self.answers.of(stage, passed), strict=True):
            for metric in cast(nn.ModuleDict, group).values():
                cast(Metric, metric).update(logits, labels)

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return what was measured."""
        found: dict[str, Tensor] = {}
        for name, group in zip(self.names, self.metrics, strict=True):
            for kind, metric in cast(nn.ModuleDict, group).items():
                found[f"{kind}_exit/{name}"] = cast(Metric, metric).compute()
        if stage == VAL and len(self.own):
            own = zip(self.names, self.own, strict=True)
            found |= {f"acc_own/{name}": cast(Metric, alone).compute() for name, alone in own}
        found["acc_exits"] = torch.stack([found[f"acc_exit/{name}"] for name in self.names]).mean()
        return found

    def report(self, values: Mapping[str, float], measured: Measured) -> Measured:
        """Fill in the accuracy of each exit."""
        exits = {name: values[f"acc_exit/{name}"] for name in self.names if f"acc_exit/{name}" in values}
        return dataclasses.replace(measured, exits=exits)


class Policy(Evaluator):
    """What an exit policy makes of the exits, in testing.

    ``policy/acc``, the mean MACs ``policy/macs`` and their share of the backbone's, ``policy/share/NAME`` of the
    samples that leave at each exit, and where something is sent ``policy/payload_bytes``, the mean over all samples, of
    which those that leave before a bottleneck send nothing there.

    Args:
        answers: Holds the policy.
        labels: The part of a batch that holds the labels (B,).
    """

    def __init__(self, answers: Answers, labels: str = "labels") -> None:
        super().__init__()
        self.answers = answers
        self.labels = labels
        self.names: tuple[str, ...] = ()
        self.costs: list[int] = []
        self.backbone_macs = 0
        self.metrics = nn.ModuleDict({"acc": MeanMetric()})
        self.shares = nn.ModuleList()

    def bind(self, network: StagedNetwork, trained: Sequence[str]) -> None:
        """Build the metrics of each exit."""
        self.answers.bind(network, trained)
        self.names = network.exits
        self.shares = nn.ModuleList(MeanMetric() for _ in self.names)
        if network.bottlenecks:
            self.metrics["payload_bytes"] = MeanMetric()

    def start(self, stage: str, network: StagedNetwork, data: Any) -> None:
        """Begin an evaluation."""
        super().start(stage, network, data)
        self.answers.start(network)
        if stage == TEST:
            self.costs, self.backbone_macs = network.exit_costs(self.answers.policy), network.backbone_macs

    def needs(self, stage: str, network: StagedNetwork) -> Sequence[str]:
        """Return every exit's own logits in testing."""
        return network.group("exits") if stage == TEST else ()

    def update(self, stage: str, passed: Passed) -> None:
        """Add a batch."""
        if stage != TEST:
            return
        network, policy = passed.network, cast(ExitPolicy, self.answers.policy)
        left = offline(policy, torch.stack([passed[name].float() for name in network.group("exits")]))
        cast(MeanMetric, self.metrics["acc"]).update((left.logits.argmax(1) == passed.batch[self.labels]).float())
        for i, metric in enumerate(self.shares):
            cast(MeanMetric, metric).update((left.index == i).float())
        if "payload_bytes" not in self.metrics:
            return
        sent = torch.zeros(len(left.index), device=left.index.device)
        for cut, payloads in passed.payloads.items():
            goes_on = left.index >= exits_before(network, cut)
            lengths = [float(len(payload) + passed.envelope_bytes) for payload in payloads]
            sent += torch.tensor(lengths, device=sent.device) * goes_on
        cast(MeanMetric, self.metrics["payload_bytes"]).update(sent)

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return what was measured."""
        if stage != TEST:
            return {}
        found = {name: cast(MeanMetric, metric).compute() for name, metric in self.metrics.items()}
        shares = [cast(MeanMetric, metric).compute() for metric in self.shares]
        found["macs"] = sum((s * cost for s, cost in zip(shares, self.costs, strict=True)), torch.zeros(()))
        found["macs_to_backbone"] = found["macs"] / self.backbone_macs
        found |= {f"share/{name}": share for name, share in zip(self.names, shares, strict=True)}
        return {f"policy/{name}": value for name, value in found.items()}

    def report(self, values: Mapping[str, float], measured: Measured) -> Measured:
        """Fill in what the policy came to."""
        if "policy/acc" not in values:
            return measured
        figures = PolicyFigures(
            accuracy=values["policy/acc"],
            macs=values["policy/macs"],
            macs_to_backbone=values["policy/macs_to_backbone"],
            shares={name: values[f"policy/share/{name}"] for name in self.names},
            payload_bytes=values.get("policy/payload_bytes"),
        )
        return dataclasses.replace(measured, policy=figures)


def exits_before(network: StagedNetwork, cut: str) -> int:
    """Return how many exits a sample meets before a bottleneck sends it on: those up to and at its cut.

    Where the bottleneck replaces the head, an exit at its cut reads what comes out of it.
    """
    place = network.cuts.index(cut) + (0 if network.replaced and cut == network.cuts[0] else 1)
    return sum(name in network.exits for name in network.cuts[:place])
