"""Schedules of the learning rate that torch has not in one piece, and that resume exactly."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosineLR(LRScheduler):
    r"""Raises the rate in a straight line, then lets it fall along a cosine, and keeps it where that ends.

    Of :math:`T` steps the first :math:`w` multiply the rate by :math:`f + (1 - f) t / w`; from there on it is
    :math:`\eta + (r - \eta) (1 + \cos(\pi (t - w) / (T - w))) / 2` (Goyal et al. 2017, Loshchilov and Hutter 2017).

    Args:
        optimizer: The optimizer, whose rates :math:`r` are reached behind the warm-up.
        T_max: Steps in all, as of torch's ``CosineAnnealingLR``.
        warmup: Steps of the warm-up, or their share of ``T_max`` where it is below 1.
        start_factor: What the rate is multiplied by at first, :math:`f`.
        eta_min: The rate in the end.
        last_epoch: The last step of a schedule that goes on; -1 for a new one.

    Raises:
        ValueError: ``T_max`` is not positive, or ``warmup`` or ``start_factor`` is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int,  # noqa: N803 as torch's schedules call it
        warmup: float = 0.05,
        start_factor: float = 0.01,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if T_max < 1:
            raise ValueError(f"T_max must be at least 1, got {T_max}")
        steps = round(warmup * T_max) if warmup < 1 else int(warmup)
        if warmup < 0 or steps >= T_max:
            raise ValueError(f"warmup must be at least 0 and less than all {T_max} steps, got {warmup}")
        if not 0 <= start_factor <= 1:
            raise ValueError(f"start_factor must lie between 0 and 1, got {start_factor}")
        self.T_max, self.warmup_steps, self.start_factor, self.eta_min = T_max, steps, start_factor, eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each parameter group at this step."""
        step = self.last_epoch
        if step < self.warmup_steps:
            factor = self.start_factor + (1 - self.start_factor) * step / self.warmup_steps
            return [rate * factor for rate in self.base_lrs]
        passed = min(1.0, (step - self.warmup_steps) / (self.T_max - self.warmup_steps))
        share = 0.5 * (1 + math.cos(math.pi * passed))
        return [self.eta_min + (rate - self.eta_min) * share for rate in self.base_lrs]
