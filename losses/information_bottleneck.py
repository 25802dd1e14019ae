"""Variational information bottleneck: what a stochastic representation may know of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRIORS = ("standard_normal", "log_uniform")
# The fit of Molchanov et al. 2017, eq. 14.
K1, K2, K3 = 0.63576, 1.87320, 1.48695


class InformationBottleneckLoss(nn.Module):
    r"""Divergence of a Gaussian representation from a prior, summed per sample and averaged over the batch.

    .. math:: L = \frac{1}{B} \sum_{b=1}^{B} \sum_i \mathrm{KL}(\mathcal N(\mu_{b,i}, \sigma^2_{b,i}) \,\Vert\, r)

    It bounds the information between image and representation from above; added with the weight β to the objective of
    the task it is the variational information bottleneck, eq. 17 of Alemi, Fischer, Dillon and Murphy, "Deep
    Variational Information Bottleneck", 2017. The priors r:

    - ``"standard_normal"`` (Alemi et al.): :math:`\mathrm{KL} = \frac12 (\mu^2 + \sigma^2 - 1 - \log \sigma^2)`.
    - ``"log_uniform"``, :math:`r(|z|) \propto 1 / |z|`, which drives elements to be all noise, so that they need not be
      sent: the variational feature encoding of Shao, Mao and Zhang, "Learning Task-Oriented Communication for Edge
      Inference: An Information Bottleneck Approach", 2022. With :math:`\alpha = \sigma^2 / \mu^2`,

      .. math:: \mathrm{KL} \approx k_1 - k_1 \, \mathrm{sigmoid}(k_2 + k_3 \log \alpha) + \tfrac12 \log(1 + 1/\alpha),

      eq. 14 of Molchanov, Ashukha and Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", 2017, with
      :math:`k = (0.63576, 1.87320, 1.48695)` and its constant set such that an element without signal costs nothing.
      The divergence depends on α alone, and its error is below 0.01 nats for every α.

    Args:
        prior: ``"standard_normal"`` or ``"log_uniform"``.

    Shape:
        - mean: (B, ...), μ.
        - log_variance: (B, ...), log σ².
        - output: scalar, in nats per sample.

    Raises:
        ValueError: ``prior`` is unknown, or the two shapes differ.

    Example:
        >>> import torch
        >>> InformationBottleneckLoss()(torch.ones(2, 4), torch.zeros(2, 4))
        tensor(2.)
    """

    def __init__(self, prior: str = "standard_normal") -> None:
        super().__init__()
        if prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}")
        self.prior = prior

    def forward(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Return the loss of a batch."""
        if mean.shape != log_variance.shape:
            raise ValueError(
                f"mean {tuple(mean.shape)} and log_variance {tuple(log_variance.shape)} differ in shape; "
                "give every element of the representation both"
            )
        dtype = torch.promote_types(mean.dtype, torch.float32)
        divergence = _from_standard_normal if self.prior == "standard_normal" else _from_log_uniform
        return divergence(mean.to(dtype), log_variance.to(dtype)).sum() / len(mean)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"prior={self.prior!r}"


def _from_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (mean.square() + log_variance.expm1() - log_variance)


def _from_log_uniform(mean: Tensor, log_variance: Tensor) -> Tensor:
    # The floor keeps the logarithm of a mean of 0 finite; below it the clamp gives the slope 0, which is exact at 0.
    log_alpha = log_variance - mean.square().clamp_min(torch.finfo(mean.dtype).tiny).log()
    # k1 - k1 sigmoid(x) = k1 sigmoid(-x), without the cancellation.
    return K1 * torch.sigmoid(-K2 - K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)
