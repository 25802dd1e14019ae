"""The base of what measures a network, and what was measured in plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.testing import Passed

VAL, TEST = "val", "test"


@dataclasses.dataclass(frozen=True)
class Width:
    """What codes of one width came to, over the test images.

    Attributes:
        bits: Width of a code; ``None`` under a learned prior.
        accuracy: Share of right answers, ``None`` where nobody measured it.
        payload_bytes: Mean bytes a sample.
        payload_zstd_bytes: The same after zstd level 1, where it was measured.
    """

    bits: int | None
    accuracy: float | None
    payload_bytes: float
    payload_zstd_bytes: float | None


@dataclasses.dataclass(frozen=True)
class PolicyFigures:
    """What an exit policy came to, over the test images.

    Attributes:
        accuracy: Share of right answers.
        macs: Mean MACs a sample.
        macs_to_backbone: The same as a share of the backbone's.
        shares: Share of the samples that leaves at each exit, by its name.
        payload_bytes: Mean bytes a sample, those of samples that leave before the split included; ``None`` without one.
    """

    accuracy: float
    macs: float
    macs_to_backbone: float
    shares: dict[str, float]
    payload_bytes: float | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a test came to, in plain values; each evaluator fills in its own.

    Attributes:
        accuracy: Share of right answers of the network as it is, at the last exit; ``None`` where nobody measured it.
        widths: One entry for each width of the codes that were sent; empty where nothing is sent.
        payload_bytes: Mean bytes a sample by bottleneck.
        exits: Share of right answers of each exit, by its name.
        policy: What the exit policy came to, where there is one.
    """

    accuracy: float | None = None
    widths: tuple[Width, ...] = ()
    payload_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    exits: dict[str, float] = dataclasses.field(default_factory=dict)
    policy: PolicyFigures | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return dataclasses.asdict(self)


class Evaluator(nn.Module):
    """Measures a network batch by batch, from the outputs that it asks for.

    A subclass holds its metrics as attributes; they are reset when an evaluation begins. The network runs once for all
    evaluators, in testing through real bytes.

    Attributes:
        every_width: Whether it also reads the passes at the other widths of a network that knows several.
        shown: Names of its values that also show in the progress bar.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> class Power(Evaluator):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.power = MeanMetric()
        ...     def needs(self, stage, network):
        ...         return ["layer2/sent"]
        ...     def update(self, stage, passed):
        ...         self.power.update(passed["layer2/sent"].square())
        ...     def compute(self, stage):
        ...         return {"power": self.power.compute()}
    """

    every_width: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...]] = ()

    def bind(self, network: StagedNetwork, trained: Sequence[str]) -> None:
        """Look at the network and its trained parts, once, before anything is measured; metrics may be made here."""

    def monitor(self, trained: Sequence[str]) -> str | None:
        """Return the logged value that says how good the network is while these parts are trained, if it has one."""
        return None

    def start(self, stage: str, network: StagedNetwork, data: Any) -> None:
        """Begin an evaluation.

        Args:
            stage: ``val`` or ``test``.
            network: The network as it is now.
            data: The trainer's data module; ``None`` where there is none.
        """
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def needs(self, stage: str, network: StagedNetwork) -> Sequence[str]:
        """Return the outputs that :meth:`update` reads."""
        return ()

    def update(self, stage: str, passed: Passed) -> None:
        """Add a batch."""

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return what was measured by name; the task puts the stage before it."""
        return {}

    def report(self, values: Mapping[str, float], measured: Measured) -> Measured:
        """Fill in what a test measured.

        Args:
            values: The logged values of all evaluators by the names that :meth:`compute` gave them.
            measured: What others have filled in.
        """
        return measured
