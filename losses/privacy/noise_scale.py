"""A reward for large noise, for noise that is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MEASURES = ("l1", "log")


class NoiseScaleLoss(nn.Module):
    r"""Falls as the noise over a representation grows: the other half of a defence whose noise is learned.

    With ``measure="l1"`` it is

    .. math:: -\sum_i |n_i|

    the second part of eq. CE − λ Σ|n_i| in Mireshghallah et al., "Shredder: Learning Noise Distributions to Protect
    Inference Privacy", 2020, section 2; with ``"log"``

    .. math:: -\frac{1}{n} \sum_i \log \sigma_i

    that of eq. CE − λ·mean log σ in Mireshghallah et al., "Not All Features Are Equal: Discovering Essential Features
    for Preserving Prediction Privacy", 2021, section 3. The weight of its term is λ.

    Args:
        measure: ``l1`` or ``log``.
        target: Mean scale over the elements above which it no longer falls, so that noise does not grow for good;
            ``None``: it always does.

    Shape:
        - scale: (B, ...), how large the noise over each element is, such as ``LAYER/noise_scale``.
        - output: a scalar.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> NoiseScaleLoss("l1")(torch.full((2, 4), 0.5))
        tensor(-2.)
    """

    def __init__(self, measure: str = "l1", target: float | None = None) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ValueError(f"measure must be {' or '.join(MEASURES)}, got {measure!r}")
        if target is not None and not 0 < target < math.inf:
            raise ValueError(f"target must be a positive finite number, got {target}")
        self.measure, self.target = measure, target

    def forward(self, scale: Tensor) -> Tensor:
        """Return the loss of a batch's scales, the same for each sample."""
        each = scale.to(torch.promote_types(scale.dtype, torch.float32)).flatten(1)
        grown = each.log().mean(1) if self.measure == "log" else each.sum(1)
        if self.target is not None:
            # Held, not cut: the value stays, the gradient goes.
            grown = torch.where(each.mean(1) >= self.target, grown.detach(), grown)
        return -grown.mean()

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"measure={self.measure}, target={self.target}"
