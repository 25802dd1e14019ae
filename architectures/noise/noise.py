"""The base of what a device lays over a representation before it is quantised and sent."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cleave.deployment import Draw


class Noise(nn.Module, abc.ABC):
    """Noise or a mask over a representation, in training and in inference, on the device's side of a split.

    A traced partition draws nothing, so the numbers come from outside: in training from torch's generator, in a bundle
    from the system's, as an input that the device draws anew for each sample. What is laid over a sample depends on
    that sample and its numbers alone.

    Attributes:
        distribution: What is drawn for each element: ``uniform`` from 0 to 1, ``normal`` of variance 1, ``laplace`` of
            scale 1; ``None`` where nothing is.

    Shape:
        - z: (B, ...), the representation.
        - output: the same, float32 or better.
    """

    distribution: ClassVar[str | None] = None

    def build(self, shape: Sequence[int], axis: int = 0) -> None:
        """Make what depends on the representation's shape: that of a sample, and its axis of channels. Here, nothing.

        The bottleneck calls it once, before anything is computed.
        """
        return

    def draws(self, shape: Sequence[int]) -> dict[str, Draw]:
        """Return what is drawn for a sample of a representation of some shape, by its name under the cut."""
        return {} if self.distribution is None else {"noise": Draw("noise", self.distribution, tuple(shape))}

    def draw(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return numbers for a batch from torch's generator, float32, in the order of :meth:`draws`."""
        return tuple(_numbers(each, len(z), z.device) for each in self.draws(z.shape[1:]).values())

    def forward(self, z: Tensor) -> Tensor:
        """Return the representation with fresh numbers over it."""
        if self.training:
            self.observe(z.detach())
        return self.lay(z, *self.draw(z))

    def observe(self, z: Tensor) -> None:
        """Learn what it must know of the representation in training. Here, nothing."""
        return

    def check_measured(self) -> None:
        """Raise ValueError where it has not seen yet what it must know. Here, it knows all."""
        return

    @abc.abstractmethod
    def lay(self, z: Tensor, *drawn: Tensor) -> Tensor:
        """Return the representation with given numbers over it; it can be traced."""

    def promise(self, classes: int) -> str | None:
        """Return what it promises of one released representation, and what that leaves possible; ``None``: nothing."""
        return None


class LearnedNoise(Noise):
    """Noise with parameters, which a bottleneck tells the size of as ``LAYER/noise_scale``."""

    @abc.abstractmethod
    def magnitude(self, z: Tensor) -> Tensor:
        """Return how large the noise over each element is, in units of its own; (B, ...)."""


def _numbers(draw: Draw, count: int, device: torch.device) -> Tensor:
    shape = (count, *draw.shape)
    if draw.distribution == "normal":
        return torch.randn(shape, device=device)
    uniform = torch.rand(shape, device=device)
    if draw.distribution == "laplace":
        # The logarithm of 1 − u, which is never 0, with a sign of its own.
        sign = torch.where(torch.rand(shape, device=device) < 0.5, -1.0, 1.0)
        return sign * -torch.log1p(-uniform)
    return uniform


def as_float(z: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return z.to(torch.promote_types(z.dtype, torch.float32))
