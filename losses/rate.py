"""Rate: the bits that an entropy coder would spend on a representation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOOR = 1e-9


class RateLoss(nn.Module):
    r"""Estimated length of the coded representation in bits per pixel of the input image.

    .. math:: R = -\frac{1}{B \cdot H W} \sum_{b=1}^{B} \sum_i \log_2 p(\hat z_{b,i})

    The cross entropy between the representation and its prior is the shortest average code that an entropy coder with
    this prior can reach: eq. 1 of Ballé, Minnen, Singh, Hwang and Johnston, "Variational Image Compression with a
    Scale Hyperprior", 2018; with distillation in place of distortion it is the rate of Matsubara, Yang, Levorato and
    Mandt, "Supervised Compression for Resource-Constrained Edge Computing Systems", 2022 (Entropic Student). Times
    ``pixels`` it is bits per image, and an eighth of that bytes.

    A likelihood below 1e-9 counts as 1e-9, just under 30 bits. The gradient passes this floor with the slope it has
    there, so that an element the prior deems impossible is still drawn back.

    Args:
        pixels: H·W of the input image; not the number of latent elements, nor times the colours.

    Shape:
        - likelihoods: (B, ...), the prior's probability of every element of the representation, in (0, 1].
        - output: scalar, in bits per pixel of the image.

    Raises:
        ValueError: ``pixels`` is not a whole number of at least 1.

    Example:
        >>> import torch
        >>> RateLoss(pixels=16)(torch.full((2, 8), 0.25))
        tensor(1.)
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 1:
            raise ValueError(f"pixels must be a whole number of at least 1, the image's height x width; got {pixels!r}")
        self.pixels = pixels

    def forward(self, likelihoods: Tensor) -> Tensor:
        """Return the rate of a batch."""
        # Half precision knows no 1e-9, and no sum this long.
        p = likelihoods.to(torch.promote_types(likelihoods.dtype, torch.float32))
        floored = p + (p.clamp_min(FLOOR) - p).detach()
        return -floored.log2().sum() / (len(p) * self.pixels)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"pixels={self.pixels}"
