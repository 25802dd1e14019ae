"""Random numbers that a placement draws for each sample, such as the noise that hides what is sent."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import is_whole
from ..naming import did_you_mean, listed
from .canonical_json import typed
from .files import BundleError
from .limits import MAX_DIMENSIONS, check_label

MAX_NUMBERS = 2**28


def _laplace(u: Tensor) -> Tensor:
    return -torch.sign(u - 0.5) * torch.log1p(-2 * (u - 0.5).abs())


# From a uniform number between 0 and 1, both exclusive, to one of each distribution, of scale 1.
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "normal": torch.special.ndtri,
    "laplace": _laplace,
}


@dataclasses.dataclass(frozen=True)
class Draw:
    """One input of a partition that its placement draws anew for each sample of each request.

    Args:
        name: The input's name on the route: ``layer2.noise``.
        distribution: ``uniform`` from 0 to 1, ``normal`` of variance 1, or ``laplace`` of scale 1, each element by
            itself.
        shape: Shape of one sample's numbers.

    Raises:
        BundleError: The name, the distribution or the shape is none.

    Example:
        >>> Draw("layer2.noise", "laplace", (2, 3)).fixed([0, 4]).shape
        torch.Size([2, 2, 3])
    """

    name: str
    distribution: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_label(self.name, "a draw")
        if self.distribution not in DISTRIBUTIONS:
            near = did_you_mean(str(self.distribution), DISTRIBUTIONS)
            raise BundleError(
                f"the distribution of {self.name} must be {listed(DISTRIBUTIONS)}, got {self.distribution!r:.80}.{near}"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        sizes = all(is_whole(size) and size > 0 for size in self.shape)
        if not sizes or len(self.shape) > MAX_DIMENSIONS or math.prod(self.shape) > MAX_NUMBERS:
            raise BundleError(
                f"the shape of {self.name} must be of at most {MAX_DIMENSIONS} positive whole numbers and "
                f"{MAX_NUMBERS:,} elements, got {list(self.shape)!r:.80}"
            )

    def fresh(self, count: int) -> Tensor:
        """Return numbers for some samples, float32 (count, *shape), from the system's own generator.

        Made in float64, and rounded: an attacker who knows all about rounding may learn more than a guarantee in exact
        numbers says.
        """
        total = count * math.prod(self.shape)
        whole = torch.from_numpy((np.frombuffer(os.urandom(8 * total), np.uint64) >> 11).astype(np.float64))
        return self._of(((whole + 0.5) * 2.0**-53).reshape(count, *self.shape))

    def fixed(self, rows: Sequence[int]) -> Tensor:
        """Return numbers that are the same for one row always, to compare what is computed of them."""
        drawn = np.stack([np.random.default_rng(row).random(self.shape) for row in rows])
        return self._of(torch.from_numpy(drawn).clamp(min=2.0**-54))

    def _of(self, uniform: Tensor) -> Tensor:
        return DISTRIBUTIONS[self.distribution](uniform).to(torch.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"name": self.name, "distribution": self.distribution, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: Any) -> Draw:
        """Read plain JSON values; :class:`BundleError` if one is missing or of another type."""
        found = typed(values, "a draw", name=str, distribution=str, shape=list)
        return cls(found["name"], found["distribution"], tuple(found["shape"]))
