"""Metrics of a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators.answers import Answers
from cleave.lightning_modules.evaluators.evaluator import TEST, Evaluator, Measured
from cleave.lightning_modules.testing import Passed, all_widths


class Classifier(Evaluator):
    """Top-1 accuracy, top-5 beyond five classes, calibration error, cross entropy, and in testing accuracy per class.

    Of a network of several widths it also tests the accuracy at each, ``bits4/acc``.

    Args:
        class_names: Names of the classes in the order of the logits.
        answers: What is measured: the answers of the last exit.
        labels: The part of a batch that holds the labels (B,).

    Raises:
        ValueError: Fewer than two classes, or another number than the network has.
    """

    every_width = True
    shown = ("acc",)

    def __init__(self, class_names: Sequence[str], answers: Answers | None = None, labels: str = "labels") -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError(f"a classifier needs at least two classes, got {list(class_names)}")
        classes = len(class_names)
        self.class_names = list(class_names)
        self.answers = answers or Answers()
        self.labels = labels
        metrics: dict[str, Metric] = {
            "acc": MulticlassAccuracy(classes, average="micro"),
            "ece": CalibrationError(classes, n_bins=15),
            "loss": MeanCrossEntropy(),
        }
        if classes > 5:
            metrics["acc_top5"] = MulticlassAccuracy(classes, average="micro", top_k=5)
        self.metrics = nn.ModuleDict(metrics)
        self.per_class = MulticlassAccuracy(classes, average=None)
        self.by_width = nn.ModuleDict()

    def bind(self, network: StagedNetwork, trained: Sequence[str]) -> None:
        """Build a metric for each width, and the policy."""
        (shape,) = {network.shapes[name] for name in network.results}
        if shape != (len(self.class_names),):
            raise ValueError(
                f"the network gives {shape} a sample, which are not logits of {len(self.class_names)} classes"
            )
        self.answers.bind(network, trained)
        for bits in all_widths(network):
            self.by_width[str(bits)] = MulticlassAccuracy(len(self.class_names), average="micro")

    def monitor(self, trained: Sequence[str]) -> str:
        """Return the validation accuracy."""
        return "val/acc"

    def start(self, stage: str, network: StagedNetwork, data: Any) -> None:
        """Begin an evaluation."""
        super().start(stage, network, data)
        self.answers.start(network)

    def needs(self, stage: str, network: StagedNetwork) -> Sequence[str]:
        """Return the outputs that the last exit's answer is made of."""
        return self.answers.needs(stage, network)

    def update(self, stage: str, passed: Passed) -> None:
        """Add a batch."""
        logits, labels = self.answers.last(stage, passed), passed.batch[self.labels]
        if str(passed.bits) in self.by_width:
            cast(Metric, self.by_width[str(passed.bits)]).update(logits, labels)
        if not passed.chosen:
            return
        for metric in self.metrics.values():
            cast(Metric, metric).update(logits, labels)
        if stage == TEST:
            self.per_class.update(logits, labels)

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return what was measured."""
        found = {name: cast(Metric, metric).compute() for name, metric in self.metrics.items()}
        if stage != TEST:
            return found
        classes = zip(self.class_names, self.per_class.compute(), strict=True)
        found |= {f"acc_class/{name}": value for name, value in classes}
        return found | {f"bits{bits}/acc": cast(Metric, metric).compute() for bits, metric in self.by_width.items()}

    def report(self, values: Mapping[str, float], measured: Measured) -> Measured:
        """Fill in the accuracy."""
        return dataclasses.replace(measured, accuracy=values.get("acc"))


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits (B, classes); torchmetrics would take small logits for probabilities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits and labels."""
        super().update(preds.softmax(1), target)


class MeanCrossEntropy(Metric):
    """Cross entropy of logits (B, classes) against labels (B,), averaged over all samples, in nats.

    Where the network has diverged it is NaN: torchmetrics' own mean would leave out the batches that went wrong.
    """

    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "samples"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        self.total = self.total + F.cross_entropy(logits, labels) * len(labels)
        self.samples = self.samples + len(labels)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.samples
