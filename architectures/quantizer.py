"""The uniform affine quantiser that turns a representation into integer codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from deployment import check_bits

RANGES = ("learned", "observed", "sample")
_TINY = 1e-8


class UniformQuantizer(nn.Module):
    r"""Uniform affine quantisation to 2 to 16 bits, differentiable by the straight-through estimator.

    With :math:`L = 2^{bits}` levels over the range :math:`[l, h]` and the step :math:`\Delta = (h - l) / (L - 1)`,

    .. math:: q = \mathrm{clamp}(\mathrm{round}((z - l) / \Delta), 0, L - 1), \qquad \hat z = l + q \Delta.

    In training the rounding passes gradients through unchanged (Bengio et al. 2013); the clamp does not, so that a
    learned range feels both the rounding error inside it and the values outside it (Esser et al., "Learned Step Size
    Quantization", 2020). In eval mode the output is exactly what the integer codes decode to.

    Args:
        bits: 2 to 16.
        range: ``"learned"``: one range trained with the network, first set to that of the first training batch;
            ``"observed"``: a moving average of the batches' minimum and maximum; ``"sample"``: each sample's own
            minimum and maximum, sent along with its codes.
        momentum: Weight of the newest batch in the moving average of ``"observed"``; ``None`` takes 0.1.

    Shape:
        - input: (B, ...), any real dtype; computed in float32 whatever autocast says.
        - output: (B, ...), float32.

    Raises:
        ValueError: ``bits``, ``range`` or ``momentum`` is out of its range.

    Example:
        >>> quantizer = UniformQuantizer(bits=2, range="sample").eval()
        >>> quantizer(torch.tensor([[0.0, 0.4, 1.1, 3.0]]))
        tensor([[0., 0., 1., 3.]])
    """

    low: Tensor
    high: Tensor
    log_width: Tensor
    initialized: Tensor

    def __init__(self, bits: int = 8, range: str = "observed", momentum: float | None = None) -> None:  # noqa: A002
        super().__init__()
        if range not in RANGES:
            raise ValueError(f"codec.range must be one of {', '.join(RANGES)}, got {range!r}")
        if momentum is not None and range != "observed":
            raise ValueError(f"codec.momentum={momentum} has no meaning for codec.range={range!r}; leave it out")
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"codec.momentum must lie in (0, 1], got {momentum}")
        self.range = range
        self.momentum = 0.1 if momentum is None else momentum
        self.bits = bits
        if range == "learned":
            self.low = nn.Parameter(torch.zeros(()))
            # A width kept as its logarithm can never turn the range inside out.
            self.log_width = nn.Parameter(torch.zeros(()))
        elif range == "observed":
            self.register_buffer("low", torch.zeros(()))
            self.register_buffer("high", torch.ones(()))
        if range != "sample":
            self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    @property
    def bits(self) -> int:
        """Width of a code in bits; may be changed at any time."""
        return self._bits

    @bits.setter
    def bits(self, value: int) -> None:
        check_bits(value)
        if value == 32:
            raise ValueError("codec.bits=32 means float: leave the quantizer out instead of building it with 32 bits")
        self._bits = value

    @property
    def fixed_range(self) -> tuple[float, float] | None:
        """The range (low, high) all samples share, or ``None`` where each sample sends its own."""
        if self.range == "sample":
            return None
        low, high = self._shared_range()
        return low.detach().item(), high.detach().item()

    def forward(self, z: Tensor) -> Tensor:
        """Return the de-quantised representation."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            levels = torch.full((), 2**self.bits, dtype=torch.int64, device=z.device)
            if not self.training:
                return self.decode(*self.encode(z, levels), levels)
            self._observe(z.detach())
            low, high = self._range(z)
            step = ((high - low) / (levels - 1)).clamp_min(_TINY)
            position = torch.minimum(((z - low) / step).clamp_min(0), (levels - 1).float())
            code = position + (position.round() - position).detach()
            return low + code * step

    def encode(self, z: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise to integer codes.

        Args:
            z: Representation (B, ...).
            levels: Number of levels, a scalar int64 tensor, 2**bits; a tensor so that it may change at run time.

        Returns:
            codes int32 (B, ...) in 0..levels-1, and the range's low and high, float32 (B,).
        """
        z = z.float()
        low, high = self._range(z)
        step = ((high - low) / (levels - 1)).clamp_min(_TINY)
        codes = torch.minimum(((z - low) / step).round().clamp_min(0), (levels - 1).float())
        batch = z.flatten(1)[:, 0]
        low, high = low.detach().flatten(), high.detach().flatten()
        return codes.to(torch.int32), low.expand_as(batch), high.expand_as(batch)

    @staticmethod
    def decode(codes: Tensor, low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
        """De-quantise codes (B, ...) with per-sample low and high (B,) into float32 (B, ...)."""
        shape = [-1] + [1] * (codes.ndim - 1)
        step = ((high - low) / (levels - 1)).clamp_min(_TINY)
        return low.view(shape) + codes.float() * step.view(shape)

    def _range(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.range != "sample":
            return self._shared_range()
        shape = [-1] + [1] * (z.ndim - 1)
        flat = z.detach().flatten(1)
        return flat.amin(1).view(shape), flat.amax(1).view(shape)

    def _shared_range(self) -> tuple[Tensor, Tensor]:
        if self.range == "learned":
            return self.low, self.low + self.log_width.exp()
        return self.low, self.high

    @torch.no_grad()
    def _observe(self, z: Tensor) -> None:
        """Set the range from the first training batch; keep following it where it is observed.

        Written without a branch on the flag: reading it would make the host wait for the device at every step.
        """
        if self.range == "sample":
            return
        low, high = _over_ranks(*torch.aminmax(z))
        if self.range == "learned":
            self.low.copy_(torch.where(self.initialized, self.low, low))
            width = (high - low).clamp_min(_TINY).log()
            self.log_width.copy_(torch.where(self.initialized, self.log_width, width))
        else:
            weight = torch.where(self.initialized, self.momentum, 1.0)
            self.low.lerp_(low, weight)
            self.high.lerp_(high, weight)
        self.initialized.fill_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UniformQuantizer:
        """Move with the network, but keep the range in float32 when the network is cast to half precision."""
        super()._apply(fn, recurse)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        return self

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"bits={self.bits}, range={self.range!r}"


@torch.compiler.disable
def _over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the extremes over all ranks, which each set their range from their own part of the batch."""
    if not distributed.is_available() or not distributed.is_initialized():
        return low, high
    extremes = torch.stack([-low, high])
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
    return -extremes[0], extremes[1]
