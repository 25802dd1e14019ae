"""The ensemble of a network's exits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cleave.losses import geometric_ensemble

LEAST = 1e-6
"""The least weight that is set: a policy takes none of 0."""


class GeometricEnsemble(nn.Module):
    """Zero Time Waste's ensemble: exit m answers q_m ∝ b_m Π_{i ≤ m} p_i^{w_mi} (Wołczyk et al. 2021).

    Weights and biases are learned as logarithms, which keeps them positive; they begin as the geometric mean.

    Args:
        exits: Number of exits E.
        classes: Number of classes.
        last: Whether the last exit answers with its ensemble; else with its own output alone, as the authors' code has
            it, and its row of weights plays no role.
    """

    decays = False  # neither weights nor biases should be small

    def __init__(self, exits: int, classes: int, last: bool = True) -> None:
        super().__init__()
        self.last = last
        start = torch.arange(1, exits + 1).reciprocal().log().unsqueeze(1).expand(exits, exits)
        self.log_weights = nn.Parameter(start.clone())
        self.log_bias = nn.Parameter(torch.zeros(exits, classes))

    @property
    def weights(self) -> Tensor:
        """The weights w (E, E), lower triangle."""
        return self.log_weights.exp().tril()

    @torch.no_grad()
    def set(self, weights: Tensor, log_bias: Tensor) -> None:
        """Set weights w > 0 (E, E), of which the lower triangle is read, and log-biases (E, classes)."""
        self.log_weights.copy_(torch.where(weights.tril() > 0, weights, 1.0).clamp_min(LEAST).log())
        self.log_bias.copy_(log_bias)

    def forward(self, logits: Sequence[Tensor]) -> Tensor:
        """Map the exits' own logits, E of (B, classes), to the logarithm of every exit's answer (E, B, classes)."""
        answers = geometric_ensemble(logits, self.weights, self.log_bias)
        if self.last:
            return answers
        own = logits[-1].to(answers.dtype).log_softmax(1)
        return torch.cat([answers[:-1], own.unsqueeze(0)])
