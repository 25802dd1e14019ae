"""Nullification: some elements of a representation are not sent."""

from __future__ import annotations

import torch
from torch import Tensor

from cleave.architectures.noise.noise import Noise, as_float


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1, got {share}; 0.5 leaves half of the elements out")


class RandomNullification(Noise):
    """Each element is 0 with some probability, drawn anew for each sample; the others stay as they are.

    After Wang, Zhang, Bao, Zhu, Cao and Yu, "Not Just Privacy: Improving Performance of Private Deep Learning in Mobile
    Cloud", 2018 (ARDEN), whose nullification matrix is random. It promises nothing by itself.

    Args:
        share: Probability of 0, 0 ≤ share < 1.

    Raises:
        ValueError: ``share`` is out of its range.

    Example:
        >>> RandomNullification(0.5).lay(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.7, 0.2]]))
        tensor([[1., 0.]])
    """

    distribution = "uniform"

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        _check_share(share)
        self.share = share

    def lay(self, z: Tensor, *drawn: Tensor) -> Tensor:
        """Return the representation with 0 where the number drawn is below the share."""
        (uniform,) = drawn
        return as_float(z) * (uniform >= self.share)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"share={self.share}"


class MagnitudeNullification(Noise):
    """The elements of a sample that are smallest in magnitude are 0; nothing is drawn.

    Args:
        share: Share of the elements that are 0, rounded down to a whole number of them, 0 ≤ share < 1.

    Raises:
        ValueError: ``share`` is out of its range.

    Example:
        >>> MagnitudeNullification(0.5).lay(torch.tensor([[1.0, -2.0, 0.5, 3.0]]))
        tensor([[ 0., -2.,  0.,  3.]])
    """

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        _check_share(share)
        self.share = share

    def lay(self, z: Tensor, *drawn: Tensor) -> Tensor:
        """Return the representation without its smallest elements; of equal ones the first go."""
        z = as_float(z)
        flat = z.flatten(1)
        order = flat.abs().argsort(dim=1, stable=True)[:, : int(self.share * flat.shape[1])]
        keep = torch.ones_like(flat).scatter(1, order, 0.0)
        return (flat * keep).reshape_as(z)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"share={self.share}"
