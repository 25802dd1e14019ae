"""InfoNCE: how well images and representations are matched, and what that says of the information between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class InfoNCELoss(nn.Module):
    r"""The cross entropy of finding the image that a representation is of, among the images of its batch.

    .. math:: L_N = -\frac{1}{N} \sum_{i=1}^{N} \log \frac{e^{f(x_i, z_i)}}{\sum_{j=1}^{N} e^{f(x_j, z_i)}}

    eq. 4 of van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018, with the
    logarithm of their density ratio as f. Whatever f, the information between both is at least log N − L_N in
    expectation (their appendix A.1), so a critic f that learns to lower the loss raises a lower bound: see
    :func:`information_below`. That can never say more than log N.

    Shape:
        - scores: (N, N), N ≥ 2; row i holds f(x_j, z_i) of representation i with every image j, its own at j = i.
        - output: scalar, in nats.

    Raises:
        ValueError: The scores are not square, or of fewer than 2.

    Example:
        >>> InfoNCELoss()(torch.zeros(4, 4))  # all alike: log 4
        tensor(1.3863)
    """

    def forward(self, scores: Tensor) -> Tensor:
        """Return the loss of a batch."""
        if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
            raise ValueError(
                f"scores must be (N, N) of N >= 2 images and their representations, got {tuple(scores.shape)}"
            )
        # Half precision does not hold the logarithm of a sum of so many.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return (scores.logsumexp(1) - scores.diagonal()).mean()


def information_below(scores: Tensor) -> Tensor:
    r"""Return what InfoNCE says from below of the information between images and representations, in bits.

    .. math:: (\log N - L_N) / \log 2 \le \log_2 N

    with L_N as in eq. 4 of van den Oord, Li and Vinyals, 2018.

    Args:
        scores: As of :class:`InfoNCELoss`, of images that the critic did not learn on.

    Returns:
        Scalar; below 0 where the critic is worse than one that knows nothing.

    Raises:
        ValueError: As of :class:`InfoNCELoss`.

    Example:
        >>> information_below(50 * torch.eye(8))  # each is found among 8: the ceiling
        tensor(3.)
    """
    return (math.log(len(scores)) - InfoNCELoss()(scores)) / math.log(2)
