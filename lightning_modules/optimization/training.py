"""The settings of a training that no objective has to know."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.private_training.settings import DPSGD

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05)
INTERVALS = ("epoch", "step")


@dataclasses.dataclass(frozen=True)
class Training:
    """How a task is trained, whatever its objective.

    Args:
        optimizer: Called with parameter groups, returns the optimizer: a ``functools.partial`` of any torch optimizer.
        scheduler: Called with the optimizer, returns a learning-rate scheduler; ``None`` keeps the rate constant. In a
            ``functools.partial`` the value ``"total_steps"`` stands for the optimizer steps of the whole run.
        scheduler_interval: ``epoch`` or ``step``: how often the scheduler is stepped.
        monitor: Metric that a plateau scheduler watches; ``None`` takes that of the task's evaluators.
        lr_scales: Layer-wise rates: a factor on the learning rate by prefix of the names that the network's weights
            have in a checkpoint; the longest prefix wins. A factor of 0 is refused: freeze such a part instead.
        layer_decay: Factor on the learning rate for every layer that lies between a weight and the output, in the
            groups that timm makes of its models' layers; what is new, such as a bottleneck, keeps the full rate.
        decay_norms_and_biases: Whether weight decay also applies to parameters of one dimension or none, and to those
            of modules that say ``decays = False``, such as a learned prior.
        compile: Compile the network's modules one by one in place with ``torch.compile``.
        channels_last: Keep the weights of convolutions, and with them all maps, channels last in memory, which CPUs and
            tensor cores in half precision run faster.
        seed: Seed of the randomness inside a training step (dropout, drop-path, noise), which depends on
            (seed, epoch, batch, rank) alone, so that a resumed run repeats it.
        dp: Differentially private training; ``None``: none.

    Raises:
        ValueError: ``scheduler_interval`` is unknown, a factor of ``lr_scales`` is not positive, or ``layer_decay``
            does not lie in (0, 1].
    """

    optimizer: Callable[[Parameters], Optimizer] = ADAMW
    scheduler: Callable[[Optimizer], Any] | None = None
    scheduler_interval: str = "epoch"
    monitor: str | None = None
    lr_scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layer_decay: float | None = None
    decay_norms_and_biases: bool = False
    compile: bool = False
    channels_last: bool = False
    seed: int = 0
    dp: DPSGD | None = None

    def __post_init__(self) -> None:
        if self.scheduler_interval not in INTERVALS:
            raise ValueError(f"scheduler_interval must be 'epoch' or 'step', got {self.scheduler_interval!r}")
        for prefix, scale in self.lr_scales.items():
            if scale <= 0:
                raise ValueError(f"lr_scales[{prefix!r}] must be positive, got {scale}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}; 0.75 is common, null is none")

    @property
    def recorded(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain values."""
        names = ("seed", "lr_scales", "layer_decay", "decay_norms_and_biases")
        return {name: getattr(self, name) for name in names} | {"lr_scales": dict(self.lr_scales)}


DEFAULT = Training()


def prepare(networks: Sequence[StagedNetwork], training: Training) -> None:
    """Lay out the memory of networks, and compile what runs by itself in them."""
    if training.channels_last:
        for network in networks:
            network.to(memory_format=torch.channels_last)
    if training.compile:
        modules = [leaf for network in networks for leaf in network.leaves()]
        # Parts of one class share the code of their forward, of which torch keeps that many versions.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 4 * len(modules))
        for module in modules:
            module.compile()
