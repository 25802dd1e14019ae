"""Lossy links between device and server: lost packets, Gaussian noise and bit errors, for training and evaluation."""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cleave.architectures.inserts.quantizer import Quantizer, UniformQuantizer
from cleave.architectures.naming import did_you_mean, whole_number

WHEN = ("train", "eval", "always", "never")
_FLOAT_BITS = 32


class Channel(nn.Module, abc.ABC):
    """What a link does to a representation on its way from the quantiser to the decoder.

    Samples are hit independently of each other, and all randomness comes from torch's global generator of the
    representation's device, so that a seeded run repeats. A range that each sample sends along with its codes
    (``range=sample``) is taken to arrive unharmed.

    Args:
        when: ``train`` or ``eval``: only in that mode; ``always``; ``never``. It may be changed at any time.

    Shape:
        - input: (B, ...), the de-quantised representation, any floating dtype.
        - output: the same shape and dtype; the very same tensor where the channel is not active.

    Raises:
        ValueError: ``when`` is unknown, or :meth:`check` refuses the quantiser.
    """

    def __init__(self, when: str = "always") -> None:
        super().__init__()
        self.when = when

    @property
    def when(self) -> str:
        """The modes in which the channel is active; may be changed at any time."""
        return self._when

    @when.setter
    def when(self, value: str) -> None:
        if value not in WHEN:
            raise ValueError(f"when must be one of {', '.join(WHEN)}, got {value!r}.{did_you_mean(str(value), WHEN)}")
        self._when = value

    @property
    def active(self) -> bool:
        """Whether the channel does anything in the present mode."""
        return self.when == "always" or self.when == ("train" if self.training else "eval")

    @property
    def at_evaluation(self) -> bool:
        """Whether the channel does anything in eval mode."""
        return self.when in ("eval", "always")

    def in_words(self) -> str:
        """Return what the channel does for a person: ``packet loss 0.3``."""
        return re.sub(r"(?<!^)(?=[A-Z])", " ", type(self).__name__).lower()

    def forward(self, z: Tensor, quantizer: Quantizer | None = None) -> Tensor:
        """Return what arrives of ``z``, which ``quantizer`` made, or nothing where it is sent as float32."""
        if not self.active:
            return z
        self.check(quantizer)
        return self.transmit(z, quantizer)

    def check(self, quantizer: Quantizer | None) -> None:
        """Raise ValueError where the link cannot carry what this quantiser makes; worth a call before training."""

    @abc.abstractmethod
    def transmit(self, z: Tensor, quantizer: Quantizer | None) -> Tensor:
        """Return what arrives of ``z`` (B, ...) over the active channel."""


class PacketLoss(Channel):
    r"""Packets are lost independently with probability p, and nothing is sent again.

    A sample's elements, in the order of its payload, are cut into packets of whole codes, the last one perhaps short.
    Elements of a lost packet arrive as 0; what arrives is scaled as inverted dropout does, so that its expectation is
    what was sent:

    .. math:: \tilde z_i = \frac{m_{k(i)}}{1 - p} \hat z_i, \qquad m_k \sim \mathrm{Bernoulli}(1 - p),

    with k(i) the packet of element i. It is the dropout by which Itahara et al. emulate a link without retransmission
    ("Packet-Loss-Tolerant Split Inference for Delay-Sensitive Deep Learning in Lossy Wireless Networks", 2021;
    "Communication-Oriented Model Fine-Tuning for Packet-Loss Resilient Distributed Inference Under Highly Lossy IoT
    Networks", 2022), drawn once a packet; ``packet_elements=1`` is theirs.

    Args:
        rate: Probability p in [0, 1), or [low, high] from which each batch draws one.
        packet_bytes: Bytes of codes in a packet, headers not counted: it holds 8·packet_bytes // bits codes.
        packet_elements: Elements in a packet, instead of ``packet_bytes``.
        interleave: Spread the elements over the packets by a fixed permutation that both sides know, so that a lost
            packet thins out all channels rather than wiping out one.
        rescale: Scale what arrives by 1 / (1 − p); without it, lost elements are 0 and the others stay as they are.
        when: As of :class:`Channel`.

    Raises:
        ValueError: An argument is out of range, or a packet is too short for a single code.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> PacketLoss(rate=0.5, packet_elements=2)(torch.ones(1, 8))
        tensor([[0., 0., 2., 2., 0., 0., 0., 0.]])
    """

    def __init__(
        self,
        rate: float | Sequence[float],
        packet_bytes: int | None = None,
        packet_elements: int | None = None,
        interleave: bool = False,
        rescale: bool = True,
        when: str = "always",
    ) -> None:
        super().__init__(when)
        self.rate = _span("rate", rate, 0, 1, open_end=True)
        if (packet_bytes is None) == (packet_elements is None):
            raise ValueError(
                f"packet_bytes and packet_elements: give one of the two, got {packet_bytes} and {packet_elements}"
            )
        for name, value in (("packet_bytes", packet_bytes), ("packet_elements", packet_elements)):
            if value is not None:
                whole_number(name, value)
        for name, flag in (("interleave", interleave), ("rescale", rescale)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be true or false, got {flag!r}")
        self.packet_bytes = packet_bytes
        self.packet_elements = packet_elements
        self.interleave = interleave
        self.rescale = rescale

    def check(self, quantizer: Quantizer | None) -> None:
        """Raise ValueError where a packet is too short for a single code, or its codes have no fixed width."""
        if self.packet_bytes is not None and quantizer is not None and quantizer.bits is None:
            raise ValueError(
                f"packet_bytes={self.packet_bytes} needs codes of a fixed width, which a learned prior's are "
                "not; give packet_elements and packet_bytes=null"
            )
        if self._elements(quantizer) < 1:
            raise ValueError(
                f"packet_bytes={self.packet_bytes} is too short for one code of {_bits(quantizer)} bits; "
                f"use at least {-(-_bits(quantizer) // 8)}"
            )

    def in_words(self) -> str:
        """Return the channel and its rate for a person."""
        return f"{super().in_words()} {_span_words(self.rate)}"

    def transmit(self, z: Tensor, quantizer: Quantizer | None) -> Tensor:
        """Return ``z`` with lost packets at 0 and the rest rescaled."""
        count, elements = math.prod(z.shape[1:]), self._elements(quantizer)
        rate = _draw(self.rate, z)
        lost = torch.rand(len(z), -(-count // elements), device=z.device) < rate
        packet = self._place_of_each(count).to(z.device) // elements
        arrived = z.masked_fill(lost[:, packet].view_as(z), 0)
        return arrived / (1 - rate) if self.rescale else arrived

    def _elements(self, quantizer: Quantizer | None) -> int:
        if self.packet_elements is not None:
            return self.packet_elements
        return 8 * (self.packet_bytes or 0) // _bits(quantizer)

    def _place_of_each(self, count: int) -> Tensor:
        """Return the place in the order of transmission of each of a sample's ``count`` elements, (count,)."""
        if not self.interleave:
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(0))

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        size = f"packet_bytes={self.packet_bytes}" if self.packet_bytes else f"packet_elements={self.packet_elements}"
        return f"rate={self.rate}, {size}, interleave={self.interleave}, rescale={self.rescale}, when={self.when!r}"


class GaussianNoise(Channel):
    r"""Additive white Gaussian noise at a signal-to-noise ratio, as of an analogue transmission.

    .. math:: \tilde z = \hat z + n, \qquad n \sim \mathcal N(0, \sigma^2 I),
        \qquad \sigma^2 = \frac{1}{N} \lVert \hat z \rVert^2 \, 10^{-\mathrm{SNR} / 10}

    with N elements a sample: the channel layer of BottleNet++ (Shao and Zhang, "BottleNet++: An End-to-End Approach for
    Feature Compression in Device-Edge Co-Inference Systems", 2020). There a sigmoid bounds the power and the noise is
    stated against its peak; here it is stated against the power that each sample really has. The gradient includes that
    of σ: a network that only sends louder gains nothing.

    Args:
        snr_db: Signal-to-noise ratio in dB, or [low, high] from which each batch draws one, evenly in dB.
        when: As of :class:`Channel`.

    Raises:
        ValueError: ``snr_db`` is not finite.

    Example:
        >>> z = torch.ones(1, 10000)
        >>> noise = GaussianNoise(snr_db=20)(z) - z
        >>> round(noise.square().mean().item(), 3)
        0.01
    """

    def __init__(self, snr_db: float | Sequence[float], when: str = "always") -> None:
        super().__init__(when)
        self.snr_db = _span("snr_db", snr_db, -math.inf, math.inf)

    def in_words(self) -> str:
        """Return the channel and its ratio for a person."""
        return f"{super().in_words()} {_span_words(self.snr_db)} dB"

    def transmit(self, z: Tensor, quantizer: Quantizer | None) -> Tensor:
        """Return ``z`` with noise."""
        wide = z if z.dtype == torch.float64 else z.float()
        shape = [-1] + [1] * (z.ndim - 1)
        # The least normal number keeps the root's gradient finite for a sample of zeros.
        power = wide.flatten(1).square().mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        deviation = power.sqrt().view(shape) * 10 ** (-_draw(self.snr_db, z) / 20)
        return (wide + deviation * torch.randn_like(wide)).to(z.dtype)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"snr_db={self.snr_db}, when={self.when!r}"


class BitErrors(Channel):
    r"""Each bit of each code flips independently with probability p: a binary symmetric channel.

    .. math:: \tilde q_i = q_i \oplus \sum_{b=0}^{bits-1} e_{ib} 2^b, \qquad e_{ib} \sim \mathrm{Bernoulli}(p)

    The codes are read from the representation by the quantiser that made it, in natural binary as the payload packs
    them, and de-quantised again; the gradient passes straight through (Bengio et al. 2013).

    Args:
        rate: Bit error rate p in [0, 0.5], or [low, high] from which each batch draws one.
        when: As of :class:`Channel`.

    Raises:
        ValueError: ``rate`` is out of range, or the representation is sent as float32, which has no codes.

    Example:
        >>> quantizer = UniformQuantizer(bits=2, range="sample").eval()
        >>> _ = torch.manual_seed(0)
        >>> BitErrors(rate=0.2)(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), quantizer)
        tensor([[0., 1., 3., 2.]])
    """

    def __init__(self, rate: float | Sequence[float], when: str = "always") -> None:
        super().__init__(when)
        self.rate = _span("rate", rate, 0, 0.5)

    def check(self, quantizer: Quantizer | None) -> None:
        """Raise ValueError where there are no codes whose bits could flip."""
        if not isinstance(quantizer, UniformQuantizer):
            raise ValueError(
                "bit errors flip bits of codes of a fixed width, but 32 bits send float32 and a "
                "learned prior whole numbers; choose bits from 2 to 16, or another channel"
            )

    def in_words(self) -> str:
        """Return the channel and its rate for a person."""
        return f"{super().in_words()} {_span_words(self.rate)}"

    def transmit(self, z: Tensor, quantizer: Quantizer | None) -> Tensor:
        """Return what the flipped codes decode to."""
        quantizer = cast(UniformQuantizer, quantizer)
        levels = torch.full((), 2**quantizer.bits, dtype=torch.int64, device=z.device)
        codes, low, high = quantizer.encode(z.detach(), levels)
        rate = _draw(self.rate, z)
        for bit in range(quantizer.bits):
            flips = torch.rand(codes.shape, device=codes.device) < rate
            codes = codes ^ (flips.to(codes.dtype) << bit)
        received = quantizer.decode(codes, low, high, levels).to(z.dtype)
        return received + (z - z.detach())  # in this order the value is exactly what was received

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"rate={self.rate}, when={self.when!r}"


def _bits(quantizer: Quantizer | None) -> int:
    return _FLOAT_BITS if quantizer is None else quantizer.bits or _FLOAT_BITS


def _span(
    name: str, value: float | Sequence[float], least: float, most: float, *, open_end: bool = False
) -> tuple[float, float]:
    """Return a number or a [low, high] as (low, high), checked."""
    ends = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise ValueError(f"{name} must be a number or [low, high], got {value!r}")
    low, high = (float(end) for end in ends)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if not least <= low <= high <= most or (open_end and high == most):
        raise ValueError(
            f"{name} must lie in [{least:g}, {most:g}{')' if open_end else ']'}, low before high, got {value!r}"
        )
    return low, high


def _span_words(span: tuple[float, float]) -> str:
    return f"{span[0]:g}" if span[0] == span[1] else f"{span[0]:g} to {span[1]:g}"


def _draw(span: tuple[float, float], z: Tensor) -> Tensor | float:
    """Return the number that a batch gets: drawn on the device, so that the host never waits for it."""
    low, high = span
    return low if low == high else low + (high - low) * torch.rand((), device=z.device)
