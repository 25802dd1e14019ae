"""Noise whose size is learned: as much of it as the task bears."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cleave.architectures.noise.noise import LearnedNoise, as_float
from cleave.deployment import Draw


class _Learned(LearnedNoise):
    """Has parameters in units of the representation's standard deviation on the first training batch."""

    unit: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unit", torch.tensor(0.0))

    def observe(self, z: Tensor) -> None:
        """Take the first training batch's standard deviation as the unit."""
        found = as_float(z).std(correction=0)
        self.unit.copy_(torch.where(self.unit > 0, self.unit, found))

    def check_measured(self) -> None:
        """Raise ValueError where no training batch has been seen, so that nothing has been learned."""
        if not self.unit > 0:
            raise ValueError("the noise is learned and has seen no training batch yet; train it")


class Shredder(_Learned):
    r"""Several noise tensors, learned over a frozen network; for each sample one is picked, and drawn anew like it.

    After Mireshghallah, Taram, Ramrakhyani, Jalali, Tullsen and Esmaeilzadeh, "Shredder: Learning Noise Distributions
    to Protect Inference Privacy", 2020. In training the picked tensor n_k itself is added, and
    learns from the task and from :class:`~cleave.losses.NoiseScaleLoss`, −λ‖n‖₁. In inference a Laplace distribution
    fitted to the elements of n_k (their median, and their mean distance from it) gives as many numbers, which are laid
    in the order of the elements of n_k: the largest where n_k is largest. What was learned is the order; the numbers
    are new each time.

    Args:
        tensors: Number of noise tensors, at least 1.
        initial: Scale of the Laplace distribution that they begin with, in standard deviations of the representation.
        seed: Of these first numbers.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> noise = Shredder(tensors=2)
        >>> noise.build((4,))
        >>> noise.eval().unit.fill_(1.0)
        tensor(1.)
        >>> noise(torch.zeros(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(self, tensors: int = 8, initial: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if isinstance(tensors, bool) or not isinstance(tensors, int) or tensors < 1:
            raise ValueError(f"tensors must be a whole number of at least 1, got {tensors!r}; 8 is usual")
        if not 0 < initial < math.inf:
            raise ValueError(f"initial must be a positive finite number, got {initial}; 0.5 is half of the spread")
        self.tensors, self.initial, self.seed = tensors, initial, seed

    def build(self, shape: Sequence[int], axis: int = 0) -> None:
        """Begin with tensors of Laplace numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand((self.tensors, *shape), generator=generator) - 0.5
        self.noises = nn.Parameter(-self.initial * uniform.sign() * torch.log1p(-2 * uniform.abs()))

    def draws(self, shape: Sequence[int]) -> dict[str, Draw]:
        """Return what is drawn: which tensor, and numbers like it."""
        return {"pick": Draw("pick", "uniform", (1,)), "noise": Draw("noise", "laplace", tuple(shape))}

    def lay(self, z: Tensor, *drawn: Tensor) -> Tensor:
        """Return the representation with a learned tensor over it; in eval mode, with new numbers in its order."""
        pick, numbers = drawn
        place = (pick[:, 0] * self.tensors).to(torch.int64).clamp(0, self.tensors - 1)
        learned = self.noises[place].flatten(1)
        if not self.training:
            middle = learned.median(1, keepdim=True).values
            spread = (learned - middle).abs().mean(1, keepdim=True)
            ranks = learned.argsort(1).argsort(1)
            learned = (middle + spread * numbers.flatten(1)).sort(1).values.gather(1, ranks)
        return as_float(z) + self.unit * learned.reshape(z.shape)

    def magnitude(self, z: Tensor) -> Tensor:
        """Return the mean magnitude of the tensors, in standard deviations of the representation, (B, ...)."""
        return self.noises.abs().mean(0).expand(z.shape)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"tensors={self.tensors}, initial={self.initial}"


class Cloak(_Learned):
    r"""Gaussian noise whose scale is learned for each element: large where the task does not look.

    After Mireshghallah, Taram, Jalali, Elthakeb, Tullsen and Esmaeilzadeh, "Not All Features Are Equal: Discovering
    Essential Features for Preserving Prediction Privacy", 2021, on the representation instead of the image:

    .. math:: z + u\sigma\varepsilon, \qquad \sigma = M (1 + \tanh\rho) / 2

    with the representation's standard deviation u. The task and :class:`~cleave.losses.NoiseScaleLoss` with
    ``measure="log"``, −λ·mean log σ, teach ρ; the network may be frozen or learn with it.

    Args:
        most: M > 0, the largest σ, in standard deviations of the representation.
        initial: σ at the beginning, between 0 and ``most``.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> noise = Cloak(most=4, initial=1)
        >>> noise.build((3,))
        >>> noise.magnitude(torch.zeros(1, 3))
        tensor([[1., 1., 1.]], grad_fn=<ExpandBackward0>)
    """

    distribution = "normal"

    def __init__(self, most: float = 5.0, initial: float = 0.1) -> None:
        super().__init__()
        if not 0 < most < math.inf:
            raise ValueError(f"most must be a positive finite number, got {most}")
        if not 0 < initial < most:
            raise ValueError(f"initial must lie between 0 and most={most:g}, got {initial}")
        self.most, self.initial = most, initial

    def build(self, shape: Sequence[int], axis: int = 0) -> None:
        """Begin with the same scale everywhere."""
        self.rho = nn.Parameter(torch.full(tuple(shape), math.atanh(2 * self.initial / self.most - 1)))

    def lay(self, z: Tensor, *drawn: Tensor) -> Tensor:
        """Return the representation with noise of the learned scale over it."""
        (noise,) = drawn
        return as_float(z) + self.unit * self._sigma() * noise

    def magnitude(self, z: Tensor) -> Tensor:
        """Return σ, in standard deviations of the representation, (B, ...)."""
        return self._sigma().expand(z.shape)

    def _sigma(self) -> Tensor:
        return self.most * (1 + self.rho.tanh()) / 2

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"most={self.most}, initial={self.initial}"
