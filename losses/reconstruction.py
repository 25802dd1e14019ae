"""Reconstruction: an autoencoder at the split restores the feature it was given."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ReconstructionLoss(nn.Module):
    r"""A power of a norm of the difference between a feature and its reconstruction, averaged over the batch.

    .. math:: L = \frac{1}{B} \sum_{b=1}^{B} \lVert z_b - z'_b + \epsilon \rVert_n^m

    eq. 5 of Matsubara, Levorato and Restuccia, "Split Computing and Early Exiting for Deep Learning Applications",
    2022. The defaults, m = 1, n = 2, ε = 1e-6, are those of Choi, Cohen and Bajić, "Back-and-Forth Prediction for Deep
    Tensor Compression", 2020; m = n = 1, ε = 0 are those of Jankowski, Gündüz and Mikolajczyk, "Joint Device-Edge
    Inference over Wireless Links with Pruning", 2020. Where a difference is exactly 0 the gradient is 0, never NaN.

    Args:
        power: m > 0, the power of the norm.
        norm: n > 0, the order of the norm over all elements of a sample.
        epsilon: ε ≥ 0, added to every element of the difference; keeps the root away from 0.

    Shape:
        - reconstruction: (B, ...), z′, the decoder's output.
        - feature: (B, ...), z, what the backbone computes at the split; no gradient flows into it.
        - output: scalar, in the features' units to the power m.

    Raises:
        ValueError: An argument is out of its range, or the two shapes differ.

    Example:
        >>> import torch
        >>> ReconstructionLoss(power=1, norm=2, epsilon=0)(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor(5.)
    """

    def __init__(self, power: float = 1, norm: float = 2, epsilon: float = 1e-6) -> None:
        super().__init__()
        for name, value in (("power", power), ("norm", norm)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive finite number, got {value}; 1 or 2 are usual")
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"epsilon must be a finite number of at least 0, got {epsilon}; 1e-6 or 0 are usual")
        self.power = power
        self.norm = norm
        self.epsilon = epsilon

    def forward(self, reconstruction: Tensor, feature: Tensor) -> Tensor:
        """Return the loss of a batch."""
        if reconstruction.shape != feature.shape:
            raise ValueError(
                f"reconstruction {tuple(reconstruction.shape)} and feature {tuple(feature.shape)} differ in shape; "
                "the decoder must give back what stands at the split"
            )
        # Half precision has no room for an epsilon of 1e-6, nor for the sum.
        dtype = torch.promote_types(reconstruction.dtype, torch.float32)
        difference = feature.detach().to(dtype) - reconstruction.to(dtype) + self.epsilon
        distance = torch.linalg.vector_norm(difference.flatten(1), self.norm, dim=1)
        # A power below 1 has an infinite slope at 0, which times the norm's slope of 0 would be NaN.
        zero = distance == 0
        return distance.masked_fill(zero, 1).pow(self.power).masked_fill(zero, 0).mean()

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"power={self.power}, norm={self.norm}, epsilon={self.epsilon}"
