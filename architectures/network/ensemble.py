"""The ensemble of a network's exits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cleave.losses import geometric_ensemble


class GeometricEnsemble(nn.Module):
    """Zero Time Waste's ensemble: exit m answers q_m ∝ b_m Π_{i ≤ m} p_i^{w_mi} (Wołczyk et al. 2021).

    Weights and biases are learned as logarithms, which keeps them positive; they begin as the geometric mean.

    Args:
        exits: Number of exits E.
        classes: Number of classes.
    """

    decays = False  # neither weights nor biases should be small

    def __init__(self, exits: int, classes: int) -> None:
        super().__init__()
        start = torch.arange(1, exits + 1).reciprocal().log().unsqueeze(1).expand(exits, exits)
        self.log_weights = nn.Parameter(start.clone())
        self.log_bias = nn.Parameter(torch.zeros(exits, classes))

    @property
    def weights(self) -> Tensor:
        """The weights w (E, E), lower triangle."""
        return self.log_weights.exp().tril()

    def forward(self, logits: Sequence[Tensor]) -> Tensor:
        """Map the exits' own logits, E of (B, classes), to the logarithm of every exit's answer (E, B, classes)."""
        return geometric_ensemble(logits, self.weights, self.log_bias)
