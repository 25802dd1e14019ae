"""A loss: any module that maps what a term reads to a scalar."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FocalLoss(nn.Module):
    """Cross entropy that is small for what is easy: (1 − p)ᵞ · −log p (Lin et al. 2017).

    Args:
        gamma: γ ≥ 0; 0 is cross entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}; 0 is cross entropy")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Map logits (B, classes) and labels (B,) to the mean."""
        surprise = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-surprise).exp()) ** self.gamma * surprise).mean()
