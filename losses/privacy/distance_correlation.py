"""Distance correlation: how much a representation still says of the images it was made from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_gather

# Centred distances below this many roundings of the largest distance are nothing but rounding.
ROUNDINGS = 64
LEAST = {False: 2, True: 4}
"""Samples that each statistic needs, by whether it is bias-corrected."""


def distance_correlation(x: Tensor, z: Tensor, *, bias_corrected: bool = False) -> Tensor:
    r"""Return the distance correlation of two batches, sample by sample.

    With a_ij = ‖x_i − x_j‖ and b_ij = ‖z_i − z_j‖, Euclidean, the plain statistic centres both doubly, A_ij = a_ij −
    ā_i· − ā_·j + ā_··, and is

    .. math:: \mathrm{dCor} = \sqrt{\mathrm{dCov}^2 / \sqrt{\mathrm{dVar}_x \mathrm{dVar}_z}}, \quad
              \mathrm{dCov}^2 = \frac{1}{n^2} \sum_{ij} A_{ij} B_{ij}, \quad
              \mathrm{dVar}_x = \frac{1}{n^2} \sum_{ij} A_{ij}^2

    eqs. 2.8 to 2.10 of Székely, Rizzo and Bakirov, "Measuring and Testing Dependence by Correlation of Distances",
    2007. It lies in [0, 1], and is far above 0 on independent data of many dimensions and few samples. The
    bias-corrected one is U-centred,

    .. math:: \tilde A_{ij} = a_{ij} - \frac{\sum_l a_{il} + \sum_k a_{kj}}{n-2} + \frac{\sum_{kl} a_{kl}}{(n-1)(n-2)},
              \quad \tilde A_{ii} = 0

    with the sums of products divided by n(n − 3), and no root is taken: its mean on independent data is 0, so it can be
    negative (Székely and Rizzo, "The Distance Correlation t-Test of Independence in High Dimension", 2013, as unbiased
    in their "Partial Distance Correlation with Methods for Dissimilarities", 2014, eq. 3.1).

    Neither changes where a batch is shifted, scaled or rotated. Both are computed in float64 where the device has it,
    and outside of autocast. Where nothing is left of the distances once they are centred, the result is 0 and so are
    the gradients.

    Args:
        x: (n, ...), real numbers or integers, any shape behind the samples.
        z: (n, ...), of as many samples.
        bias_corrected: Which of the two.

    Returns:
        Scalar without a unit, float32 or better.

    Raises:
        ValueError: The batches differ in length, or have fewer samples than the statistic needs: 2, or 4 where it is
            bias-corrected.

    Example:
        >>> x = torch.arange(8.0).reshape(4, 2)
        >>> distance_correlation(x, 3 - 2 * x)
        tensor(1.)
    """
    n, least = len(x), LEAST[bias_corrected]
    if len(z) != n:
        raise ValueError(f"x has {n} samples and z {len(z)}; both must be of one batch")
    if n < least:
        name = "bias-corrected" if bias_corrected else "plain"
        raise ValueError(f"the {name} distance correlation needs a batch of at least {least} samples, got {n}")
    centre = _u_centred if bias_corrected else _doubly_centred
    with torch.autocast(x.device.type, enabled=False):
        (a, some_a), (b, some_b) = (_spread(centre, _distances(each)) for each in (x, z))
        # Masked before the root, whose slope at 0 is infinite.
        none = ~(some_a & some_b)
        spread = ((a * a).sum() * (b * b).sum()).masked_fill(none, 1).sqrt()
        found = ((a * b).sum() / spread).masked_fill(none, 0)
        if not bias_corrected:
            none = found <= 0
            found = found.masked_fill(none, 1).sqrt().masked_fill(none, 0)
    return found.to(torch.promote_types(torch.promote_types(_real(x), _real(z)), torch.float32))


class DistanceCorrelationLoss(nn.Module):
    r"""The distance correlation between images and a representation of them, as a regulariser.

    After Vepakomma, Singh, Gupta and Raskar, "NoPeek: Information leakage reduction to share activations in distributed
    deep learning", 2020, eq. 1, whose objective is α₁·dCor(x, z) + α₂·CE; see :func:`distance_correlation` for its own
    equations. A low value is no proof that images cannot be restored: attacks judge that.

    Args:
        bias_corrected: Whether the statistic is the bias-corrected one, which needs 4 samples and can be negative.
        gather: Whether the samples of all ranks are one batch, as in a run of one process; else each rank has its own.

    Shape:
        - images: (n, ...), n ≥ 2, or n ≥ 4 where bias-corrected; no gradient flows into them.
        - representation: (n, ...).
        - output: scalar, without a unit.

    Raises:
        ValueError: As of :func:`distance_correlation`.

    Example:
        >>> images = torch.arange(12.0).reshape(4, 3)
        >>> DistanceCorrelationLoss()(images, torch.zeros(4, 5))
        tensor(0.)
    """

    defends = True
    """It teaches the encoder to hide images, so there must be one that learns."""

    def __init__(self, bias_corrected: bool = False, gather: bool = True) -> None:
        super().__init__()
        self.bias_corrected = bias_corrected
        self.gather = gather

    @property
    def least_batch(self) -> int:
        """Samples that the statistic needs."""
        return LEAST[self.bias_corrected]

    def forward(self, images: Tensor, representation: Tensor) -> Tensor:
        """Return the statistic of a batch."""
        images = images.detach()
        if self.gather and distributed.is_available() and distributed.is_initialized():
            images, representation = (torch.cat(all_gather(each.contiguous())) for each in (images, representation))
        return distance_correlation(images, representation, bias_corrected=self.bias_corrected)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"bias_corrected={self.bias_corrected}, gather={self.gather}"


def _real(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float32


def _distances(x: Tensor) -> Tensor:
    """Return the distances of all pairs, (n, n), of samples around 0 and within 1; by one factor for all."""
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    flat = flat.to(torch.float32 if x.device.type == "mps" else torch.float64)
    flat = flat - flat.mean(0)
    size = flat.detach().abs().amax()
    flat = flat / size.masked_fill(size == 0, 1)
    # Not by products of matrices, which leave equal samples a little apart.
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")


def _spread(centre: Callable[[Tensor], Tensor], distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return centred distances, and whether they are more than what rounding leaves."""
    centred = centre(distances)
    rounding = ROUNDINGS * torch.finfo(distances.dtype).eps * distances.detach().amax()
    return centred, centred.detach().abs().amax() > rounding


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)


def _doubly_centred(a: Tensor) -> Tensor:
    return a - a.mean(0, keepdim=True) - a.mean(1, keepdim=True) + a.mean()


def _u_centred(a: Tensor) -> Tensor:
    n = len(a)
    rows = a.sum(0, keepdim=True) / (n - 2)
    return (a - rows - rows.T + a.sum() / ((n - 1) * (n - 2))).masked_fill(_diagonal(a), 0)
