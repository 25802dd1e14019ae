"""What a report on early exits measures of a network: every exit's logits, and what leaving there costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cleave.architectures import MultiExitNetwork
from cleave.datamodules import ImageDataModule
from cleave.deployment import ExitPolicy
from cleave.planning.stored_logits import check_costs
from cleave.reports.exits.timing import exit_seconds


class Stored(NamedTuple):
    """What every exit said of a split, on the CPU.

    Attributes:
        logits: Every exit's own logits (E, B, C), float32.
        labels: int64 (B,).
    """

    logits: Tensor
    labels: Tensor


class Costs(NamedTuple):
    """What leaving at each exit costs per image.

    Attributes:
        unit: ``macs``, ``seconds`` or ``given``.
        backbone: Cost of the backbone alone, which budgets are shares of.
        exits: Cumulative cost of each exit; MACs do not count the policy's own.
        last: Cost of the last exit where no exit stands before it, or what comes closest to that.
    """

    unit: str
    backbone: float
    exits: list[float]
    last: float

    def of(self, network: MultiExitNetwork, policy: ExitPolicy) -> list[float]:
        """Return the cumulative cost of leaving at each exit by a policy."""
        return list(network.exit_costs(policy)) if self.unit == "macs" else self.exits


@torch.no_grad()
def stored_logits(network: MultiExitNetwork, data: ImageDataModule, split: str, device: torch.device) -> Stored:
    """Run every image of a split through the whole network once."""
    data.prepare_data()
    found, labels = [], []
    for batch in data.eval_dataloader(split):
        logits = network.classify(network.reduced(data.input.normalize(batch["images"].to(device))))
        found.append(torch.stack([own.float().cpu() for own in logits]))
        labels.append(batch["labels"].long())
    return Stored(torch.cat(found, dim=1), torch.cat(labels))


def exit_costs(kind: str | Sequence[float], network: MultiExitNetwork, batches: Sequence[Tensor], count: int) -> Costs:
    """Return the costs that a report is in: ``macs``, ``seconds``, or a list of one's own.

    Args:
        kind: Which.
        network: The network, in eval mode.
        batches: Normalised images to measure seconds on.
        count: How many batches, repeated from the first where there are fewer.

    Raises:
        ValueError: There is not a number for each exit, or they do not rise.
    """
    if kind == "macs":
        parts = {part: cost["macs"] for part, cost in network.profile().items()}
        unexited = sum(macs for part, macs in parts.items() if not part.startswith("exit at "))
        return Costs("macs", network.backbone_macs, list(network.exit_costs()), unexited)
    if kind == "seconds":
        exits, backbone = exit_seconds(network, batches, count)
        if exits != sorted(set(exits)):
            raise ValueError(
                f"the measured seconds do not rise from exit to exit: {', '.join(f'{s:.3g}' for s in exits)}; measure "
                "longer by timing.batches, in larger batches by timing.batch_size, or take costs=macs"
            )
        return Costs("seconds", backbone, exits, backbone if network.bottleneck is None else exits[-1])
    given = check_costs(kind, len(network.exit_names)).tolist()  # type: ignore[arg-type]
    return Costs("given", given[-1], given, given[-1])
