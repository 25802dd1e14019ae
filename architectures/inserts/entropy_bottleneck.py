"""A learned prior over a representation: the likelihoods that a rate is made of and the tables of its entropy coder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures.inserts.finite import check_finite
from cleave.architectures.naming import whole_number
from cleave.deployment import CodecError, EntropyCodec
from cleave.deployment.codecs.entropy_codec import MAX_SYMBOLS

LIKELIHOOD_BOUND = 1e-9
TAIL_MASS = 1e-6
# Where the tails are looked for: a representation beyond ±10^6 quantisation steps is not one that is worth coding.
_FURTHEST = 2.0**20
_BISECTIONS = 48
# Weights, bias and factor of a layer of the cumulative; the last layer has no factor.
_Layer = tuple[Tensor, Tensor, Tensor | None]


class EntropyBottleneck(nn.Module):
    r"""Rounding to whole numbers under a prior that is learned for each channel.

    The prior is the factorised, non-parametric density of Ballé, Minnen, Singh, Hwang and Johnston, "Variational Image
    Compression with a Scale Hyperprior", 2018, appendix 6.1. Its cumulative is a monotone network of its own for every
    channel,

    .. math::
        c = \sigma \circ f_K \circ \dots \circ f_1, \qquad f_k(x) = g_k(H_k x + b_k), \qquad
        g_k(x) = x + a_k \odot \tanh x,

    with :math:`H_k = \mathrm{softplus}(\hat H_k)`, :math:`a_k = \tanh(\hat a_k)` and :math:`g_K` the identity. Noise
    from :math:`U(-\frac12, \frac12)` stands for the rounding in training; the density of what comes out (appendix 6.2)
    is at whole numbers the probability of the code,

    .. math:: p(\hat z) = c(\hat z + \tfrac12) - c(\hat z - \tfrac12).

    In eval mode the output is exactly what the integer codes decode to: rounded, and clamped to the channel's support,
    beyond which the prior sees less than 1e-6 on either side. The support follows from the parameters: it is found
    again whenever the module enters eval mode and whenever the state of a module in training is saved, so that neither
    a network in eval mode nor a checkpoint holds an old one. Who changes parameters in eval mode calls :meth:`update`.

    Args:
        channels: Channels C of the representation.
        axis: Where they stand in a sample: 0 for maps (B, C, H, W), -1 for tokens (B, L, C).
        filters: Widths of the hidden layers of the cumulative.
        init_scale: Rough half-width, in quantisation steps, of the density that training begins with, at least 0.1;
            most of the representation should lie inside.

    Attributes:
        low, high: Ends of the support, int32 (C,).

    Shape:
        - input: (B, ...) with C channels along ``axis``, any real dtype; computed in float32 whatever autocast says.
        - output: as the input, float32.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> prior = EntropyBottleneck(channels=2).eval()
        >>> z = torch.tensor([[[0.4, -1.2], [2.6, 0.0]]])
        >>> prior(z)
        tensor([[[ 0., -1.],
                 [ 3.,  0.]]])
        >>> prior.likelihoods(prior(z)).shape
        torch.Size([1, 2, 2])
    """

    bits = None  # codes of a learned prior have no width
    widths: tuple[int, ...] = ()
    decays = False  # nor has it weights that should be small
    low: Tensor
    high: Tensor

    def __init__(
        self, channels: int, axis: int = 0, filters: Sequence[int] = (3, 3, 3), init_scale: float = 10.0
    ) -> None:
        super().__init__()
        self.filters = tuple(filters) if isinstance(filters, Sequence) and not isinstance(filters, str) else ()
        whole_number("channels", channels)
        if isinstance(axis, bool) or axis not in (0, -1):
            raise ValueError(f"axis must be 0 (channels first) or -1 (channels last), got {axis!r}")
        if not self.filters:
            raise ValueError(f"filters must be a list of whole numbers, got {filters!r}")
        for number, filter_width in enumerate(self.filters):
            whole_number(f"filters[{number}]", filter_width)
        if isinstance(init_scale, bool) or not isinstance(init_scale, int | float) or not 0.1 <= init_scale < math.inf:
            raise ValueError(f"init_scale must be a number of at least 0.1, got {init_scale!r}")
        self.channels, self.axis = channels, axis
        widths = (1, *self.filters, 1)
        scale = init_scale ** (1 / (len(widths) - 1))
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise(widths):
            # The inverse of the softplus, so that all layers together divide by init_scale.
            start = math.log(math.expm1(1 / (scale * outputs)))
            self.matrices.append(nn.Parameter(torch.full((channels, outputs, inputs), start)))
            self.biases.append(nn.Parameter(torch.rand(channels, outputs, 1) - 0.5))
        for width in self.filters:
            self.factors.append(nn.Parameter(torch.zeros(channels, width, 1)))
        self.register_buffer("low", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("high", torch.zeros(channels, dtype=torch.int32))
        self.register_state_dict_pre_hook(_update_before_saving)
        self.update()

    def forward(self, z: Tensor) -> Tensor:
        """Return z with uniform noise in training, what its codes decode to in eval mode."""
        if z.shape[self._dim(z)] != self.channels:
            raise ValueError(
                f"the representation must have {self.channels} channels along dimension {self._dim(z)}, "
                f"got shape {tuple(z.shape)}"
            )
        if not self.training:
            # A frozen prior hands gradients on to an encoder that still learns; the value is what the codes decode to.
            return self.decode(self.encode(z)) + (z - z.detach())
        z = z.to(self.matrices[0].dtype)
        return z + torch.rand_like(z) - 0.5

    def likelihoods(self, z_hat: Tensor) -> Tensor:
        """Return the probability of each element of :meth:`forward`'s output, in its shape, 1e-9 at the least.

        Below that bound the gradient passes only where descending along it makes the element likelier.
        """
        with torch.autocast(z_hat.device.type, enabled=False):
            x = z_hat.to(self.matrices[0].dtype).movedim(self._dim(z_hat), 0)
            edges = x.reshape(self.channels, 1, -1)
            layers = self._layers()
            mass = _mass(_logits(edges - 0.5, layers), _logits(edges + 0.5, layers))
            mass = _LowerBound.apply(mass, LIKELIHOOD_BOUND)
            return mass.reshape(x.shape).movedim(0, self._dim(z_hat))

    def estimated_bits(self, z_hat: Tensor) -> Tensor:
        """Return the bits that the prior predicts for each sample of codes or of :meth:`forward`'s output, (B,)."""
        return -self.likelihoods(z_hat).log2().flatten(1).sum(1)

    def encode(self, z: Tensor) -> Tensor:
        """Round to codes int32 in the shape of z, clamped to the support."""
        z = z.to(self.matrices[0].dtype)
        shape = [1] * (z.ndim - 1)
        shape[self.axis] = self.channels
        low, high = self.low.to(z.dtype).view(shape), self.high.to(z.dtype).view(shape)
        return z.round().clamp(low, high).to(torch.int32)

    send = encode

    @staticmethod
    def decode(codes: Tensor) -> Tensor:
        """Return codes as float32."""
        return codes.float()

    receive = decode

    def codec(self, shape: tuple[int, ...]) -> EntropyCodec:
        """How codes of this per-sample shape become bytes under the present prior.

        Raises:
            NumberError: The network has diverged.
        """
        return EntropyCodec.from_tables(shape, self.tables(), self.axis)

    def check_measured(self) -> None:
        """Refuse a prior that is no longer one; the support of codes follows from it.

        Raises:
            NumberError: The network has diverged.
        """
        for parameter in self.parameters():
            check_finite(parameter, "the learned prior")

    def with_bits(self, bits: int) -> NoReturn:
        """Refuse: the prior is learned for steps of one, so there is no other width."""
        raise CodecError(f"bits={bits}: a learned prior has no width of codes; leave bits out")

    @torch.no_grad()
    def tables(self) -> list[tuple[int, npt.NDArray[np.float64]]]:
        """Return each channel's least code and the probabilities of its codes from there upwards.

        What lies beyond the support is clamped to its ends, so the ends hold the tails and the sum is 1. Computed in
        float64 on the CPU.

        Raises:
            NumberError: The network has diverged.
        """
        self.check_measured()
        if self.training:
            self.update()
        low, high = self.low.cpu(), self.high.cpu()
        widest = int((high - low).max()) + 1
        edges = low.double().view(-1, 1, 1) - 0.5 + torch.arange(widest + 1, dtype=torch.float64)
        logits = _logits(edges, self._double_layers())[:, 0]
        found = []
        for row, least, most in zip(logits, low.tolist(), high.tolist(), strict=True):
            count = most - least + 1
            ends = F.pad(row[1:count], (1, 1))
            ends[0], ends[-1] = -math.inf, math.inf
            mass = _mass(ends[:-1], ends[1:]).numpy()
            found.append((least, mass / mass.sum()))
        return found

    @torch.no_grad()
    def update(self) -> None:
        """Find the support again, after the parameters have changed in eval mode.

        Computed in float64 on the CPU, so that it depends on the parameters alone and not on the device.
        """
        tail = math.log(TAIL_MASS) - math.log1p(-TAIL_MASS)
        targets = torch.tensor([tail, 0.0, -tail], dtype=torch.float64)
        below = torch.full((self.channels, 1, 3), -_FURTHEST, dtype=torch.float64)
        above = -below
        layers = self._double_layers()
        for _ in range(_BISECTIONS):
            middle = (below + above) / 2
            left = _logits(middle, layers) < targets
            below, above = torch.where(left, middle, below), torch.where(left, above, middle)
        first, median, last = above[:, 0].unbind(1)
        # The least support; where that is more than a coder's table holds, the middle of it.
        centre = median.round()
        high = torch.minimum((last - 0.5).ceil(), centre + MAX_SYMBOLS // 2 - 1)
        low = torch.minimum(torch.maximum((first + 0.5).floor(), centre - MAX_SYMBOLS // 2), high)
        self.low.copy_(low)
        self.high.copy_(high)

    def train(self, mode: bool = True) -> EntropyBottleneck:
        """Set the mode; entering eval mode, find the support that the parameters have by now."""
        super().train(mode)
        if not mode:
            self.update()
        return self

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"channels={self.channels}, axis={self.axis}, filters={self.filters}"

    def _dim(self, z: Tensor) -> int:
        return 1 if self.axis == 0 else z.ndim - 1

    def _layers(self) -> list[_Layer]:
        factors = [*self.factors, None]
        return list(zip(self.matrices, self.biases, factors, strict=True))

    def _double_layers(self) -> list[_Layer]:
        return [
            (matrix.cpu().double(), bias.cpu().double(), None if factor is None else factor.cpu().double())
            for matrix, bias, factor in self._layers()
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EntropyBottleneck:
        """Move with the network, but keep every digit of the prior when the network is cast to half precision."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.element_size() >= tensor.element_size() else tensor.to(moved.device)

        super()._apply(keep, recurse)
        return self


class _LowerBound(torch.autograd.Function):
    """The larger of x and a bound; below it only gradients pass that a descent follows upwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return gradient * ((x >= ctx.bound) | (gradient < 0)), None


def _logits(x: Tensor, layers: Sequence[_Layer]) -> Tensor:
    """Logits of the cumulative at x (C, 1, N), in the same shape."""
    for matrix, bias, factor in layers:
        x = F.softplus(matrix) @ x + bias
        if factor is not None:
            x = x + torch.tanh(factor) * torch.tanh(x)
    return x


def _mass(lower: Tensor, upper: Tensor) -> Tensor:
    """Probability between two logits of the cumulative, accurate in both tails."""
    # In the upper tail the sigmoid is 1 less something that floats cannot hold; mirrored, it is that something.
    sign = torch.where(lower + upper > 0, -1.0, 1.0).to(lower.dtype)
    return sign * (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower))


def _update_before_saving(module: EntropyBottleneck, prefix: str, keep_vars: bool) -> None:
    if module.training:
        module.update()
