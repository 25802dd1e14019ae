"""A bound on one loss while others are pushed as far as they go: the multiplier of a constrained objective."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class BoundedLoss(nn.Module):
    r"""A loss that should stay below a threshold, weighted by a multiplier that follows how far it is above.

    The survey's privacy form minimises w_CE·CE − w_p·Σ MSE(F⁻¹(x_pid), x_{pid−1}) with CE ≤ Thr (printed as ≥), in
    "Towards Optimal Placement of Deep Learning Tasks over Edge and Cloud Infrastructures", 3.2: here CE is this loss,
    and each edge of the route has an :class:`~cleave.losses.AdversarialReconstructionLoss` of strength w_p as a term.
    The Lagrangian w·L + μ·(L − Thr) (eq. 5.1 of Boyd and Vandenberghe, "Convex Optimization", 2004) is minimised over
    the network and raised over μ, once a step,

    .. math:: \mu \leftarrow \max(0, \mu + \eta\,(L - \mathrm{Thr}))

    which is dual ascent. The bound holds on average where the multiplier has come to rest.

    Args:
        loss: The loss L, which returns a scalar.
        threshold: Thr, in the loss's unit.
        weight: w ≥ 0.
        rate: η > 0.
        most: The largest μ, so that a bound which cannot be held does not outgrow all else.

    Shape:
        - arguments: those of the loss.
        - output: scalar, (w + μ)·L − μ·Thr.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> bounded = BoundedLoss(nn.MSELoss(), threshold=1.0, rate=0.5)
        >>> bounded(torch.tensor([2.0]), torch.tensor([0.0]))  # μ = 1.5, of L = 4
        tensor(8.5000)
    """

    multiplier: Tensor
    average: Tensor
    steps: Tensor

    def __init__(
        self, loss: nn.Module, threshold: float, weight: float = 1.0, rate: float = 0.01, most: float = 1000.0
    ) -> None:
        super().__init__()
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be a finite number of at least 0, got {weight}")
        for name, value in (("rate", rate), ("most", most)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        self.loss = loss
        self.threshold, self.own_weight, self.rate, self.most = threshold, weight, rate, most
        self.register_buffer("multiplier", torch.tensor(0.0))
        self.register_buffer("average", torch.tensor(0.0))
        self.register_buffer("steps", torch.tensor(0))

    @property
    def holds(self) -> bool | None:
        """Whether the moving average of the loss over some hundred steps is within the bound; ``None`` before any."""
        return None if int(self.steps) == 0 else float(self.average) <= self.threshold

    @property
    def verdict(self) -> str | None:
        """Whether the bound holds, as a sentence for the end of a training; ``None`` before any step."""
        if self.holds is None:
            return None
        words = "within" if self.holds else "above"
        return (
            f"the loss is {float(self.average):.4g} over the last steps, {words} the bound of {self.threshold:g}; "
            f"multiplier {float(self.multiplier):.4g}"
        )

    def forward(self, *values: Tensor) -> Tensor:
        """Return the weighted loss of a batch, and move the multiplier in training."""
        loss: Tensor = self.loss(*values)
        if self.training:
            found = loss.detach().to(torch.float32)
            self.multiplier.add_(self.rate * (found - self.threshold)).clamp_(0, self.most)
            self.steps.add_(1)
            # As slow as a mean over all steps at first, and over the last hundred later.
            self.average.lerp_(found, 1 / self.steps.clamp(max=100))
        return (self.own_weight + self.multiplier) * loss - self.multiplier * self.threshold

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"threshold={self.threshold}, weight={self.own_weight}, rate={self.rate}"
