"""A learned mask over channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cleave.architectures.noise.noise import Noise


class ChannelMask(Noise):
    r"""Whole channels are sent as 0; training learns which, together with the task and whatever judges privacy.

    The structured pruning of Ding, Zhang, Pan and Yuan, "PATROL: Privacy-Oriented Pruning for
    Collaborative Inference Against Model Inversion Attacks", 2024, as a mask: with a term such as
    :class:`~cleave.losses.AdversarialReconstructionLoss`, the channels stay that serve the task and not the image.
    Each channel has a score; those with the highest stay, and gradients reach the scores as if they were the mask
    (Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", 2020).

    Args:
        share: Share of the channels that are 0, rounded down to a whole number of them, 0 ≤ share < 1.

    Raises:
        ValueError: ``share`` is out of its range.

    Example:
        >>> mask = ChannelMask(0.5)
        >>> mask.build((4, 1, 1))
        >>> int((mask(torch.ones(1, 4, 1, 1)) == 0).sum())
        2
    """

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"share must be at least 0 and below 1, got {share}; 0.5 leaves half of the channels out")
        self.share = share

    def build(self, shape: Sequence[int], axis: int = 0) -> None:
        """Begin with equal scores, of which the first channels win."""
        self.axis = axis % len(shape)
        self.scores = nn.Parameter(torch.zeros(shape[self.axis]))

    def mask(self) -> Tensor:
        """Return 1 for each channel that stays and 0 for each other, (channels,)."""
        order = self.scores.argsort(descending=True, stable=True)
        kept = order[: len(order) - int(self.share * len(order))]
        mask = torch.zeros_like(self.scores).scatter(0, kept, 1.0)
        return mask + (self.scores - self.scores.detach())

    def lay(self, z: Tensor, *drawn: Tensor) -> Tensor:
        """Return the representation without the channels that are masked."""
        shape = [1] * z.ndim
        shape[1 + self.axis] = -1
        return z * self.mask().reshape(shape)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"share={self.share}"
