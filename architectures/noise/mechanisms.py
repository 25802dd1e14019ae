"""Clipping and noise of a known scale, with a guarantee of differential privacy."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from cleave.architectures.noise.guarantee import gaussian_accuracy, gaussian_sigma, laplace_accuracy, laplace_scale
from cleave.architectures.noise.noise import Noise, as_float

MEDIAN = "median"
RATE = 0.2


class _Mechanism(Noise):
    """Clips each sample's norm to a bound C, z / max(1, ‖z‖/C), and adds noise in proportion to it."""

    order: ClassVar[int]
    bound: Tensor
    relative: float

    def __init__(self, epsilon: float | None, bound: float | str | None, scale: float | None, name: str) -> None:
        super().__init__()
        if (epsilon is None) == (scale is None):
            raise ValueError(
                f"give either epsilon, which says what is promised, or {name}, which promises nothing, got "
                f"epsilon={epsilon} and {name}={scale}"
            )
        if epsilon is not None and bound is None:
            raise ValueError(f"epsilon={epsilon} is promised of clipped representations alone; give bound, or {name}")
        if isinstance(bound, str) and bound != MEDIAN:
            raise ValueError(f"bound must be a number above 0, {MEDIAN}, or null for no clipping, got {bound!r}")
        if isinstance(bound, int | float) and not 0 < bound < math.inf:
            raise ValueError(f"bound must be a positive finite number, {MEDIAN}, or null for no clipping, got {bound}")
        if scale is not None and not 0 <= scale < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {scale}")
        self.epsilon, self.scale = epsilon, scale
        self.adaptive, self.clips = bound == MEDIAN, bound is not None
        self.register_buffer("bound", torch.tensor(0.0 if bound in (None, MEDIAN) else float(bound)))

    def norms(self, z: Tensor) -> Tensor:
        """Return the norm of each sample, (B,)."""
        return torch.linalg.vector_norm(as_float(z).flatten(1), self.order, dim=1)

    def observe(self, z: Tensor) -> None:
        """Move the bound towards the median norm: C ← C·exp(0.2·(1 − 2·share of norms up to C)).

        Geometric updates towards a quantile, after Andrew, Thakkar, McMahan and Ramaswamy, "Differentially Private
        Learning with Adaptive Clipping", 2021; the first batch's own median begins.
        """
        if not self.adaptive:
            return
        norms = self.norms(z)
        below = (norms <= self.bound).to(norms.dtype).mean()
        moved = self.bound * (RATE * (1 - 2 * below)).exp()
        self.bound.copy_(torch.where(self.bound > 0, moved, norms.median()))

    def check_measured(self) -> None:
        """Raise ValueError where the bound is to be the median norm and no training batch has been seen."""
        if self.adaptive and not self.bound > 0:
            raise ValueError(
                "the noise's bound waits for its first training batch; train, or give noise.bound a number"
            )

    def lay(self, z: Tensor, *drawn: Tensor) -> Tensor:
        """Return the clipped representation with noise over it."""
        z = as_float(z)
        (noise,) = drawn
        if self.clips:
            over = (self.norms(z) / self.bound).clamp(min=1)
            z = z / over.reshape(-1, *[1] * (z.ndim - 1))
        return z + (self.bound * self.relative if self.scale is None else self.scale) * noise


class LaplaceMechanism(_Mechanism):
    r"""Clipping by the L1 norm and Laplace noise of scale 2C/ε: ε-differential privacy of one release.

    Theorem 3.6 of Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014, with the sensitivity of
    any input against any other, 2C. Each further release of one image adds another ε; quantisation behind it costs
    nothing; the rounding of float numbers is not covered.

    Args:
        epsilon: ε > 0; ``None``: ``scale`` says how much noise.
        bound: C > 0, ``median`` for the median norm of training images, or ``None`` for no clipping.
        scale: Scale of the noise in the representation's unit, which promises nothing; ``None``: as ε says.

    Raises:
        ValueError: An argument is out of its range, or privacy is promised without clipping.

    Example:
        >>> noise = LaplaceMechanism(epsilon=2, bound=1)
        >>> noise.lay(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2))
        tensor([[0.7500, 0.2500]])
    """

    distribution = "laplace"
    order = 1

    def __init__(
        self, epsilon: float | None = None, bound: float | str | None = MEDIAN, scale: float | None = None
    ) -> None:
        super().__init__(epsilon, bound, scale, "scale")
        self.relative = 0.0 if epsilon is None else laplace_scale(epsilon, 2)

    def promise(self, classes: int) -> str | None:
        """Return ε, and the highest accuracy that it leaves possible."""
        if self.epsilon is None:
            return None
        most = 100 * laplace_accuracy(self.epsilon, classes)
        words = f"at most {most:.1f} % of answers among {classes} classes can be right"
        return f"ε = {self.epsilon:g} for one release; {words}"

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"epsilon={self.epsilon}, scale={self.scale}"


class GaussianMechanism(_Mechanism):
    r"""Clipping by the L2 norm and Gaussian noise: (ε, δ)-differential privacy of one release.

    σ is the analytic one of Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", 2018, for a
    sensitivity of 2C; see :func:`~cleave.architectures.gaussian_sigma`. As for the rest, see :class:`LaplaceMechanism`.

    Args:
        epsilon: ε > 0; ``None``: ``sigma`` says how much noise.
        delta: 0 < δ < 1.
        bound: C > 0, ``median`` for the median norm of training images, or ``None`` for no clipping.
        sigma: σ in the representation's unit, which promises nothing; ``None``: as ε and δ say.
        classic: Whether σ is the classic one of Dwork and Roth, for ε below 1.

    Raises:
        ValueError: An argument is out of its range, or privacy is promised without clipping.

    Example:
        >>> GaussianMechanism(epsilon=10, delta=1e-5, bound=1).relative < 1.001
        True
    """

    distribution = "normal"
    order = 2

    def __init__(
        self,
        epsilon: float | None = None,
        delta: float = 1e-5,
        bound: float | str | None = MEDIAN,
        sigma: float | None = None,
        classic: bool = False,
    ) -> None:
        super().__init__(epsilon, bound, sigma, "sigma")
        self.delta, self.classic = delta, classic
        self.relative = 0.0 if epsilon is None else gaussian_sigma(epsilon, delta, 2, classic=classic)

    def promise(self, classes: int) -> str | None:
        """Return ε and δ, and the accuracy of ideal codewords behind the noise."""
        if self.epsilon is None:
            return None
        most = 100 * gaussian_accuracy(self.epsilon, self.delta, classes)
        words = f"ideal codewords of {classes} classes are told apart in {most:.1f} %"
        return f"ε = {self.epsilon:g} and δ = {self.delta:g} for one release; {words}"

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"epsilon={self.epsilon}, delta={self.delta}, sigma={self.scale}"
