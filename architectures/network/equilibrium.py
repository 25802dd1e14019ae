"""Gradient equilibrium: gradients that meet where an exit branches off, scaled so that their variance stays even."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class Branch(nn.Module):
    """The place where an exit branches off: of k exits, the i-th has k − i behind it.

    Its own gradient reaches the backbone times 1 / (k − i + 1), beside (k − i) / (k − i + 1) of what comes from behind
    (gradient equilibrium, Li et al. 2019, "Improved Techniques for Training Adaptive Deep Networks").

    Args:
        behind: Number of exits behind this one, the last one among them.
    """

    def __init__(self, behind: int) -> None:
        super().__init__()
        self.behind = behind

    def forward(self, feature: Tensor, wanted: frozenset[str] = frozenset()) -> tuple[Tensor, Tensor]:
        """Return the feature for the exit and for what stands behind it; as it is where nobody reads the exit."""
        if ":exit" not in wanted:
            return feature, feature
        return (
            scale_gradient(feature, 1 / (self.behind + 1)),
            scale_gradient(feature, self.behind / (self.behind + 1)),
        )


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()  # not a view: a layer that works in place may follow

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradients[0], None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x`` as it is; its gradient is multiplied by ``factor``."""
    return cast(Tensor, _ScaleGradient.apply(x, factor))
