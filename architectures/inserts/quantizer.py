"""The uniform affine quantiser, which makes integer codes of a representation, and the one that does nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn

from cleave.architectures.inserts.entropy_bottleneck import EntropyBottleneck
from cleave.architectures.inserts.finite import DEAD, DIVERGED, NumberError
from cleave.deployment import FLOAT_BITS, Codec, FloatCodec, check_bits, code_codec
from cleave.deployment.codecs.uniform import RANGE_LIMIT, usable_range

RANGES = ("learned", "observed", "sample")
_TINY = 1e-8
# A range no wider than this, or than this share of its ends, is one value.
_NARROW = 1e-6


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
            minimum and maximum, sent along with its codes. A batch with NaN or infinity moves no range, and one of a
            single value throughout does not count as the first.
        momentum: Weight of the newest batch in the moving average of ``"observed"``; ``None`` takes 0.1.
        coding: How codes become bytes; see :func:`cleave.deployment.code_codec`.
        quality: Of a lossy image codec among the codings.
        widths: Several bits that one network is trained for, ``bits`` among them; each gets a BatchNorm of its own.

    Shape:
        - input: (B, ...), any real dtype; computed in float32 whatever autocast says.
        - output: (B, ...), float32.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> quantizer = UniformQuantizer(bits=2, range="sample").eval()
        >>> quantizer(torch.tensor([[0.0, 0.4, 1.1, 3.0]]))
        tensor([[0., 0., 1., 3.]])
    """

    low: Tensor
    high: Tensor
    log_width: Tensor
    initialized: Tensor

    def __init__(
        self,
        bits: int = 8,
        range: str = "observed",  # noqa: A002
        momentum: float | None = None,
        coding: str = "packed",
        quality: int | None = None,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if range not in RANGES:
            raise ValueError(f"range must be one of {', '.join(RANGES)}, got {range!r}")
        if momentum is not None and range != "observed":
            raise ValueError(f"momentum={momentum} has no meaning for range={range!r}; leave it out")
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie in (0, 1], got {momentum}")
        self.coding, self.quality = coding, quality
        self.widths = tuple(sorted(widths or ()))
        if self.widths and bits not in self.widths:
            raise ValueError(f"bits={bits} must be one of widths={list(self.widths)}: it is the one validated")
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
        if value == FLOAT_BITS:
            raise ValueError("bits=32 means float: leave the quantizer out instead of building it with 32 bits")
        self._bits = value

    @property
    def fixed_range(self) -> tuple[float, float] | None:
        """The range (low, high) all samples share, or ``None`` where each sample sends its own."""
        if self.range == "sample":
            return None
        low, high = self._shared_range()
        return low.detach().item(), high.detach().item()

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Set the range all samples share, as :func:`~cleave.architectures.calibrate_range` measures it.

        Training goes on from there: a learned range is trained further, an observed one keeps following the batches.

        Raises:
            ValueError: The range or its width is not finite in float32, or it is upside down, or each sample sends its
                own.
        """
        if self.range == "sample":
            raise ValueError("range=sample takes each sample's own range; to set one, use learned or observed")
        ends = torch.tensor([low, high], dtype=torch.float32)
        if ends[0] >= ends[1] or not usable_range(low, high):
            raise ValueError(
                f"a range is two finite numbers in float32 of at most {RANGE_LIMIT:.3g} either way, the lower one "
                f"first, got [{low}, {high}]"
            )
        self.low.copy_(ends[0])
        if self.range == "learned":
            self.log_width.copy_((ends[1] - ends[0]).clamp_min(_TINY).log())
        else:
            self.high.copy_(ends[1])
        self.initialized.fill_(True)

    def codec(self, shape: tuple[int, ...]) -> Codec:
        """How codes of this width and range become bytes; see :func:`cleave.deployment.code_codec`.

        Raises:
            NumberError: The range is no longer one: the network has diverged, or its encoder is dead.
        """
        self._check_range()
        low, high = self.fixed_range or (None, None)
        return code_codec(self.coding, shape, self.bits, low, high, quality=self.quality)

    @torch.compiler.disable
    def check_measured(self) -> None:
        """Refuse codes whose range nobody has measured.

        Raises:
            NumberError: The network has diverged, or its encoder is dead.
            ValueError: The range still waits for its first training batch.
        """
        self._check_range()
        if self.range != "sample" and not self.initialized:
            raise ValueError(
                f"range={self.range} is measured in training, which this network's bottleneck has not seen; train it, "
                "or use range=sample"
            )

    def _check_range(self) -> None:
        """Say what happened where the shared range cannot be coded with."""
        if self.fixed_range is None:
            return
        low, high = self.fixed_range
        if not usable_range(low, high):
            raise NumberError(f"the range of the codes is [{low:g}, {high:g}]: {DIVERGED}")
        if not self._is_wide(torch.tensor(low), torch.tensor(high)):
            raise NumberError(f"the representation is {low:g} everywhere: {DEAD}")

    def with_bits(self, bits: int) -> UniformQuantizer | Unquantized:
        """Return this quantiser at another width; 32 is no quantiser at all."""
        if check_bits(bits) == FLOAT_BITS:
            return Unquantized()
        self.bits = bits
        return self

    def forward(self, z: Tensor) -> Tensor:
        """Return the de-quantised representation."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            levels = torch.full((), 2**self.bits, dtype=torch.int64, device=z.device)
            if self.training:
                self._observe(z.detach())
            low, high = self._range(z)
            step = ((high - low) / (levels - 1)).clamp_min(_TINY)
            position = torch.minimum(((z - low) / step).clamp_min(0), (levels - 1).float())
            # In this order the sum is the code in every bit: eval mode gives exactly what the codes decode to.
            code = position.round().detach() + (position - position.detach())
            out = low + code * step
            if not self.training or self.range == "sample":
                return out
            # No batch has had a range so far: one value passes as it is, as does the gradient that may revive it.
            return torch.where(self.initialized, out, z)

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

    send = encode

    @staticmethod
    def decode(codes: Tensor, low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
        """De-quantise codes (B, ...) with per-sample low and high (B,) into float32 (B, ...)."""
        shape = [-1] + [1] * (codes.ndim - 1)
        step = ((high - low) / (levels - 1)).clamp_min(_TINY)
        return low.view(shape) + codes.float() * step.view(shape)

    receive = decode

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
        """Set the range from the first training batch that has one; keep following it where it is observed.

        While all batches are of one value the range lies there without a width.

        Written without a branch on the flag: reading it would make the host wait for the device at every step.
        """
        if self.range == "sample":
            return
        low, high = _over_ranks(*torch.aminmax(z))
        # Of a batch that overflowed, what is finite is no measure either.
        sound = (low.abs() <= RANGE_LIMIT) & (high.abs() <= RANGE_LIMIT)
        first = sound & ~self.initialized
        if self.range == "learned":
            self.low.copy_(torch.where(first, low, self.low))
            self.log_width.copy_(torch.where(first, (high - low).clamp_min(_TINY).log(), self.log_width))
        else:
            weight = torch.where(first, 1.0, self.momentum)
            self.low.lerp_(torch.where(sound, low, self.low), weight)
            self.high.lerp_(torch.where(sound, high, self.high), weight)
        self.initialized.logical_or_(first & self._is_wide(low, high))

    def _is_wide(self, low: Tensor, high: Tensor) -> Tensor:
        """Whether a range holds more than one value, and steps that a gradient can widen."""
        least = _TINY * (2 ** max(self.bits, *self.widths, 0) - 1)
        ends = torch.maximum(low.abs(), high.abs()).clamp_min(1)
        return high - low > (_NARROW * ends).clamp_min(least)

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


class Unquantized(nn.Module):
    """The representation as it is, float32: what 32 bits mean."""

    bits = FLOAT_BITS
    widths: tuple[int, ...] = ()

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z``."""
        return z

    def codec(self, shape: tuple[int, ...]) -> Codec:
        """Raw float32, 4 bytes an element."""
        return FloatCodec(shape)

    def check_measured(self) -> None:
        """Refuse nothing: floats have no range."""

    def with_bits(self, bits: int) -> Unquantized:
        """Return this quantiser if ``bits`` is 32.

        Raises:
            ValueError: Codes need a range, which a network trained without a quantiser does not know.
        """
        if check_bits(bits) != FLOAT_BITS:
            raise ValueError(f"bits={bits}: this network was trained with bits=32 and knows no range")
        return self

    def send(self, z: Tensor) -> Tensor:
        """Return what the device sends."""
        return z.float()

    @staticmethod
    def receive(z: Tensor) -> Tensor:
        """Return what arrived."""
        return z


Quantizer = UniformQuantizer | Unquantized | EntropyBottleneck


def _over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the extremes over all ranks, which each set their range from their own part of the batch."""
    if not distributed.is_available() or not distributed.is_initialized():
        return low, high
    # A maximum over ranks may lose a NaN on its way, and never an infinity.
    extremes = torch.stack([-low, high]).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
    return -extremes[0], extremes[1]
