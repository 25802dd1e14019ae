"""The settings of differentially private training, and the noise that a wanted ε takes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import warnings
from typing import Any

from cleave.architectures.naming import did_you_mean

ACCOUNTANTS = ("rdp", "prv")
_TIGHT = 1e-3
_MOST_NOISE = 1e6


@dataclasses.dataclass(frozen=True)
class DPSGD:
    r"""Differentially private training by DP-SGD, with Opacus.

    Each step takes each training image with probability q, clips the gradient of each image to the norm C, and adds
    Gaussian noise to their sum,

    .. math:: \tilde g = \frac{1}{B} \Big( \sum_i g_i \min(1, C / \lVert g_i \rVert) + \sigma C\, \mathcal N(0, I) \Big)

    with B the expected number of images in a batch (Abadi et al., "Deep Learning with Differential Privacy", 2016,
    algorithm 1). The trained weights are (ε, δ)-differentially private in the training images.

    Args:
        max_grad_norm: C > 0.
        epsilon: ε > 0 that the whole training may spend; the noise is found for it. Either this or
            ``noise_multiplier``.
        delta: 0 < δ < 1; less than one over the number of training images is usual.
        noise_multiplier: σ > 0; ε is what it comes to.
        accountant: ``rdp`` (Rényi divergence; Mironov, Talwar and Zhang 2019) or ``prv`` (privacy random variables;
            Gopi, Lee and Wutschitz 2021), which is tighter and slower.
        seeded: Whether noise and batches follow the run's seed, so that a run can be repeated and resumed exactly. Who
            knows the seed can take the noise away; ``False`` draws both from the system's generator.

    Raises:
        ValueError: An argument is out of its range, or Opacus is not installed.
    """

    max_grad_norm: float = 1.0
    epsilon: float | None = None
    delta: float = 1e-5
    noise_multiplier: float | None = None
    accountant: str = "rdp"
    seeded: bool = True

    def __post_init__(self) -> None:
        if importlib.util.find_spec("opacus") is None:
            raise ValueError(
                "DP-SGD needs Opacus, which is not installed: pip install opacus opt_einsum, the extra `dp` "
                "(pip install 'cleave[dp]')"
            )
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                "give either epsilon, for which the noise is found, or noise_multiplier, got "
                f"epsilon={self.epsilon} and noise_multiplier={self.noise_multiplier}"
            )
        for name in ("max_grad_norm", "epsilon", "noise_multiplier"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        if not (_is_number(self.delta) and 0 < self.delta < 1):
            raise ValueError(f"delta must lie between 0 and 1, such as 1e-5, got {self.delta!r}")
        if self.accountant not in ACCOUNTANTS:
            near = did_you_mean(str(self.accountant), ACCOUNTANTS)
            raise ValueError(f"accountant must be one of {', '.join(ACCOUNTANTS)}, got {self.accountant!r}.{near}")
        if not isinstance(self.seeded, bool):
            raise ValueError(f"seeded must be true or false, got {self.seeded!r}")

    def noise(self, rate: float, steps: float) -> float:
        """Return σ for a training of so many steps: the given one, or the least that spends no more than ε.

        Args:
            rate: Probability q of an image in a batch.
            steps: Steps of the whole training; infinite where it has no end.

        Raises:
            ValueError: The training has no end, or no noise is enough.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        if not math.isfinite(steps):
            raise ValueError(
                f"the noise for epsilon={self.epsilon:g} depends on the number of steps, but the run has no end; set "
                "trainer.max_epochs, or give noise_multiplier instead"
            )
        assert self.epsilon is not None
        high = 1.0
        while self._spends(high, rate, steps) > self.epsilon:
            high *= 2
            if high > _MOST_NOISE:
                raise ValueError(
                    f"no noise keeps {steps:.0f} steps at a rate of {rate:.3g} within epsilon={self.epsilon:g} and "
                    f"delta={self.delta:g}; give a larger epsilon"
                )
        low = 0.0
        while high - low > _TIGHT * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self._spends(middle, rate, steps) <= self.epsilon else (middle, high)
        return high

    def _spends(self, noise: float, rate: float, steps: float) -> float:
        return self.spent([(noise, rate, int(steps))])

    def spent(self, history: list[tuple[float, float, int]]) -> float:
        """Return ε of steps taken: (σ, q, number of steps) each; 0 before any."""
        if not history:
            return 0.0
        with warnings.catch_warnings():
            # It tells that an order at the end of its list was best: a bound all the same, if a loose one.
            warnings.filterwarnings("ignore", "Optimal order is the")
            return _by_rdp(history, self.delta) if self.accountant == "rdp" else _by_prv(history, self.delta)


def _by_rdp(history: list[tuple[float, float, int]], delta: float) -> float:
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(steps * _divergence(noise, rate) for noise, rate, steps in history)
    epsilon, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)
    return float(epsilon)


@functools.lru_cache(maxsize=256)
def _divergence(noise: float, rate: float) -> Any:
    """Return the Rényi divergences of one step, of which Opacus' accountant would find each anew for every report."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)


def _by_prv(history: list[tuple[float, float, int]], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
