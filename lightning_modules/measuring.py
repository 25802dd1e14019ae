"""A module that measures a network by evaluators, in validation and testing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cleave.architectures import StagedNetwork
from cleave.architectures.inserts.finite import DIVERGED, NumberError
from cleave.lightning_modules.evaluators.evaluator import TEST, VAL, Evaluator, Measured
from cleave.lightning_modules.resuming import ResumingModule
from cleave.lightning_modules.testing import Passed, set_widths, through_bytes

Batch = Mapping[str, Any]


class MeasuredModule(ResumingModule):
    """Measures a network: it runs once a batch for all evaluators, in testing through the real bytes of what is sent.

    Args:
        network: The network.
        evaluators: What measures it.
        trained: The parts of it that are trained.
        reads: The part of a batch that the network runs on.
        seed: Seed of what a noisy channel draws.
    """

    def __init__(
        self, network: StagedNetwork, evaluators: Iterable[Evaluator], trained: Sequence[str], reads: str, seed: int
    ) -> None:
        super().__init__()
        self.network = network
        self.reads = reads
        self.seed = seed
        self.trained_parts = tuple(trained)
        self.chosen_bits = {cut: cast(int, network.bits(cut)) for cut in network.widths}
        self.evaluators = bound(evaluators, network, trained)
        self._broken: dict[str, Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the network's inputs to its answer."""
        return self.network(inputs)

    def reseed(self, *place: int | str) -> None:
        """Seed torch's generators from the task's seed, a place in the run, and the rank."""
        key = "/".join(map(str, (self.seed, *place, self.global_rank))).encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))

    def evaluate_with(self, evaluators: Iterable[Evaluator]) -> None:
        """Measure the network by other evaluators from now on."""
        self.evaluators = bound(evaluators, self.network, self.trained_parts)

    def on_validation_epoch_start(self) -> None:
        """Begin to measure, at the width that the network was built with."""
        self._start(VAL)

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Reseed, so that a noisy channel does the same to the same images."""
        self.reseed("evaluation", batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the network on a validation batch, without bytes."""
        outputs = self.network.outputs(batch[self.reads], self._needed(VAL))
        passed = Passed(self.network, batch, outputs)
        for name, output in outputs.items():
            self._broken[name] = self._broken.get(name, False) | is_broken(output)
        for each in self._evaluators():
            each.update(VAL, passed)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured."""
        self._log(VAL)

    def on_test_start(self) -> None:
        """Refuse to measure codes whose range nobody has measured.

        Raises:
            NumberError: The network has diverged, or an encoder is dead.
            ValueError: A quantiser's range still waits for its first training batch.
        """
        for bottleneck in self.network.bottlenecks.values():
            bottleneck.check_measured()

    def on_test_epoch_start(self) -> None:
        """Begin to measure."""
        self._start(TEST)

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Reseed, so that a noisy channel does the same to the same images."""
        self.reseed("evaluation", batch_idx)

    def broken_outputs(self) -> list[str]:
        """Return the outputs that held NaN or infinity in the last validation."""
        return [name for name, broken in self._broken.items() if broken]

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the network on a test batch, through its bytes, at every width that it knows.

        Raises:
            NumberError: What the network makes of it is NaN or infinite, or what it would send is.
        """
        names = self._needed(TEST)
        for passed in through_bytes(self.network, batch, batch[self.reads], names, self.chosen_bits):
            for name, output in passed.outputs.items():
                if is_broken(output):
                    raise NumberError(f"{name} of the network holds NaN or infinity in testing: {DIVERGED}")
            for each in self._evaluators():
                if passed.chosen or each.every_width:
                    each.update(TEST, passed)

    def on_test_epoch_end(self) -> None:
        """Log what was measured."""
        self._log(TEST)

    def measured(self, metrics: Mapping[str, Any] | None = None) -> Measured:
        """Return what a test measured in plain values.

        Args:
            metrics: The logged values, ``test/acc`` …; ``None`` takes those of the trainer that tested the task.
        """
        logged = self.trainer.callback_metrics if metrics is None else metrics
        values = {
            name.removeprefix("test/"): float(value) for name, value in logged.items() if name.startswith("test/")
        }
        measured = Measured()
        for each in self._evaluators():
            measured = each.report(values, measured)
        return measured

    def _evaluators(self) -> Iterator[Evaluator]:
        return (cast(Evaluator, each) for each in self.evaluators)

    def _needed(self, stage: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for each in self._evaluators() for name in each.needs(stage, self.network)))

    def _start(self, stage: str) -> None:
        set_widths(self.network, self.chosen_bits)
        self._broken = {}
        for each in self._evaluators():
            each.start(stage, self.network, getattr(self.trainer, "datamodule", None))

    def _log(self, stage: str) -> None:
        for each in self._evaluators():
            for name, value in each.compute(stage).items():
                # The metrics are the same on every rank by now; Lightning cannot know and would warn.
                shown = stage == VAL and name in each.shown
                self.log(f"{stage}/{name}", torch.as_tensor(value).float(), prog_bar=shown, sync_dist=True)


def is_broken(output: Tensor) -> Tensor:
    """Whether an output holds NaN or positive infinity; its opposite masks a class by right."""
    return (output.isnan() | output.isposinf()).any()


def bound(evaluators: Iterable[Evaluator], network: StagedNetwork, trained: Sequence[str]) -> nn.ModuleList:
    """Return evaluators that have looked at a network."""
    found = list(evaluators)
    for each in found:
        each.bind(network, trained)
    return nn.ModuleList(found)
