"""The stochastic encoder of a variational information bottleneck."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cleave.deployment import Draw

LOG_VARIANCE_RANGE = (-20.0, 10.0)
INITIAL_LOG_VARIANCE = -5.0


class GaussianEncoder(nn.Module):
    r"""An encoder whose representation is drawn from a Gaussian: :math:`z = \mu(x) + \sigma(x) \, \varepsilon`.

    In train mode the output is a sample, through which gradients reach mean and variance (the reparameterisation of
    Kingma and Welling, "Auto-Encoding Variational Bayes", 2014); in eval mode it is the mean, and the variance is not
    computed. A frozen encoder, which is in eval mode, therefore adds no noise. With ``sampled`` the output is a sample
    in either mode, so a device draws for each image.

    Args:
        body: Layers that mean and variance share; may be empty.
        mean: Maps the body's output to μ (B, ...).
        log_variance: Maps the body's output to log σ² (B, ...), clamped to [-20, 10], so that neither σ nor a
            divergence overflows; or a number, the constant log σ² of every element.
        sampled: Whether the representation is drawn in eval mode too.

    Raises:
        ValueError: ``log_variance`` is a number that is not finite.

    Example:
        >>> encoder = GaussianEncoder(nn.Sequential(), nn.Linear(8, 2), nn.Linear(8, 2))
        >>> [tuple(part.shape) for part in encoder.distribution(torch.zeros(4, 8))]
        [(4, 2), (4, 2)]
    """

    def __init__(
        self, body: nn.Sequential, mean: nn.Module, log_variance: nn.Module | float, sampled: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(log_variance, nn.Module) and not math.isfinite(log_variance):
            raise ValueError(f"log_variance must be a module or a finite number, got {log_variance}")
        self.body = body
        self.mean = mean
        self.log_variance = log_variance
        self.sampled = sampled

    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """Return a sample of the representation, by given numbers if there are any, or the mean where none is drawn."""
        return self.sample(*self.distribution(x), *drawn) if self.draws_now else self.mean(self.body(x))

    @property
    def draws_now(self) -> bool:
        """Whether the output is a sample in the present mode."""
        return self.training or self.sampled

    def draws(self, shape: Sequence[int]) -> dict[str, Draw]:
        """Return what a device draws for a sample of a representation of some shape, by its name under the cut."""
        return {"sample": Draw("sample", "normal", tuple(shape))} if self.sampled else {}

    def distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the representation, both (B, ...), in either mode.

        The log-variance is at least float32: in bfloat16 a constant would be off by up to a hundredth.
        """
        hidden = self.body(x)
        mean = self.mean(hidden)
        dtype = torch.promote_types(mean.dtype, torch.float32)
        if isinstance(self.log_variance, nn.Module):
            return mean, self.log_variance(hidden).to(dtype).clamp(*LOG_VARIANCE_RANGE)
        return mean, torch.full_like(mean, self.log_variance, dtype=dtype)

    @staticmethod
    def sample(mean: Tensor, log_variance: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw a sample in the mean's dtype; noise and sum are at least float32, whatever autocast says."""
        dtype = torch.promote_types(mean.dtype, torch.float32)
        noise = torch.randn_like(mean, dtype=dtype) if noise is None else noise.to(dtype)
        return (mean.to(dtype) + (0.5 * log_variance).exp() * noise).to(mean.dtype)

    def on_device(self) -> nn.Module:
        """Return what a device runs: body and mean, the very modules of this encoder; all of it where it is sampled."""
        return self if self.sampled else nn.Sequential(*self.body, self.mean)

    def extra_repr(self) -> str:
        """Show a constant log-variance in the printed module."""
        constant = [] if isinstance(self.log_variance, nn.Module) else [f"log_variance={self.log_variance:.4g}"]
        return ", ".join([*constant, *(["sampled=True"] if self.sampled else [])])


def make_gaussian(encoder: nn.Module, variance: str | float = "learned", sampled: bool = False) -> GaussianEncoder:
    """Make an encoder of :func:`~cleave.architectures.build_bottleneck` stochastic; it becomes the mean.

    Args:
        encoder: A sequence that ends in the projection, a convolution or a linear layer; or a linear layer alone. Its
            modules are taken over, not copied.
        variance: ``"learned"``: a second projection of the same geometry gives the log-variance. It starts at -5
            everywhere (σ = 0.08), so that training begins close to the deterministic encoder. A number above 0: the
            variance of every element, as that of a channel's noise in Shao, Mao and Zhang, "Learning Task-Oriented
            Communication for Edge Inference: An Information Bottleneck Approach", 2022.
        sampled: Whether the representation is drawn in inference too, on the device, and not the mean sent.

    Raises:
        ValueError: ``variance`` is neither.
        TypeError: The encoder does not end in a projection.

    Example:
        >>> make_gaussian(nn.Linear(8, 2), variance=0.01)
        GaussianEncoder(
          log_variance=-4.605
          (body): Sequential()
          (mean): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    layers = list(encoder) if isinstance(encoder, nn.Sequential) else [encoder]
    projection = layers[-1] if layers else None
    if not isinstance(projection, nn.Conv2d | nn.Linear):
        raise TypeError(
            f"a stochastic encoder needs one that ends in a Conv2d or Linear, got {type(projection).__name__} last; "
            "take the encoder that build_bottleneck makes"
        )
    log_variance = _learned(projection) if variance == "learned" else _constant(variance)
    return GaussianEncoder(nn.Sequential(*layers[:-1]), projection, log_variance, sampled)


def _constant(variance: str | float) -> float:
    if isinstance(variance, str | bool) or not 0 < variance < math.inf:
        raise ValueError(f"variance must be 'learned' or a positive finite number, got {variance!r}")
    return math.log(variance)


def _learned(projection: nn.Conv2d | nn.Linear) -> nn.Module:
    head = copy.deepcopy(projection)
    nn.init.zeros_(head.weight)
    head.bias = nn.Parameter(head.weight.new_full((len(head.weight),), INITIAL_LOG_VARIANCE))
    return head
