"""What a path is worth: the reward of 2024, to be made large, and the cost of 2023, to be made small."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from cleave.planning.paths.throughput import Throughput


@dataclass(frozen=True)
class Logistic:
    r"""A smooth step: :math:`\sigma(s (x - m))`, a half where x = m.

    Args:
        slope: s; above 0.
        middle: m.

    Raises:
        ValueError: The slope is not above 0, or a number is not finite.

    Example:
        >>> Logistic(8, 0.86)(0.86)
        0.5
    """

    slope: float
    middle: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slope) and self.slope > 0):
            raise ValueError(f"slope must be a number above 0, got {self.slope!r}")
        if not math.isfinite(self.middle):
            raise ValueError(f"middle must be a number, got {self.middle!r}")

    def __call__(self, x: float) -> float:
        """Return the value at x, between 0 and 1."""
        z = self.slope * (x - self.middle)
        # Either form overflows on one side.
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


@dataclass(frozen=True)
class PathReward:
    r"""The reward of "Edge AI as a Service with Coordinated Deep Neural Networks" (2024), to be made large.

    .. math:: F = \xi(A_{av}) \cdot \zeta(Th_p / Th_0)

    The page that defines ξ and ζ is missing. By default ξ(A) = σ(8 (A - 0.86)) and ζ(t) = σ(8 (t - 1)), with accuracy
    as a fraction: with these, the numbers that the paper prints make its winner the best path. Both can be replaced.

    Args:
        accuracy: ξ: from the average accuracy, a fraction, to its worth.
        throughput: ζ: from the throughput, in multiples of the local network's own, to its worth.

    Example:
        >>> from cleave.planning.paths.throughput import original_throughput, path_throughput
        >>> reward = PathReward()
        >>> round(reward(path_throughput(1.0, 0.503, 1.242), 0.867, 0.827), 3)
        0.45
        >>> round(reward(original_throughput(1.0), 0.867, 0.867), 3)
        0.257
    """

    accuracy: Callable[[float], float] = field(default_factory=lambda: Logistic(8.0, 0.86))
    throughput: Callable[[float], float] = field(default_factory=lambda: Logistic(8.0, 1.0))

    def __call__(self, throughput: Throughput, original: float, path: float) -> float:
        """Return the reward of a path.

        Args:
            throughput: What it does per second.
            original: A_0: accuracy of the local network.
            path: A_p: accuracy of the path.
        """
        return self.accuracy(throughput.average_accuracy(original, path)) * self.throughput(throughput.ratio)


@dataclass(frozen=True)
class PathLoad:
    """What a path asks of both sides per image.

    Attributes:
        local_seconds: T_l: time per image on the local side.
        host_seconds: T_h: time per image on the host.
        communication_seconds: T_cm: time per image on the wire.
        local_params: C_l: parameters of the local blocks that run.
        host_params: C_h: parameters that run on the host, links included.
    """

    local_seconds: float
    host_seconds: float = 0.0
    communication_seconds: float = 0.0
    local_params: int = 0
    host_params: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


@dataclass(frozen=True)
class PathCost:
    r"""The cost of "Coordinated Deep Neural Networks: A Versatile Edge Offloading Algorithm" (2023), to be made small.

    .. math:: F = e^{a (L_A - A_p)} + b T_{cm} + c_l T_l + c_h T_h + d_l C_l + d_h C_h \qquad (1)

    The accuracies are fractions, the times microseconds and C millions of parameters; these units agree with the
    paper's winner, which prints none. It gives a = 40, 1e-6 and 2e-5 as c (the second is printed as another
    c_l, and read as c_h) and d = 10. It gives no b: the default weighs time on the wire as time on the local side.

    Args:
        least_accuracy: L_A: the accuracy below which a path soon becomes dear.
        accuracy_weight: a.
        communication_weight: b.
        local_time_weight: c_l.
        host_time_weight: c_h.
        local_params_weight: d_l.
        host_params_weight: d_h.

    Raises:
        ValueError: A weight is negative, or ``least_accuracy`` is no fraction.

    Example:
        >>> load = PathLoad(local_seconds=0.001, host_seconds=0.002, local_params=1_000_000, host_params=500_000)
        >>> round(PathCost(least_accuracy=0.85)(load, 0.85), 3)
        16.041
    """

    least_accuracy: float
    accuracy_weight: float = 40.0
    communication_weight: float = 1e-6
    local_time_weight: float = 1e-6
    host_time_weight: float = 2e-5
    local_params_weight: float = 10.0
    host_params_weight: float = 10.0

    def __post_init__(self) -> None:
        check_fraction("least_accuracy", self.least_accuracy)
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")

    def __call__(self, load: PathLoad, accuracy: float) -> float:
        """Return the cost of a path.

        Args:
            load: What it asks of both sides.
            accuracy: A_p.
        """
        micro, millions = 1e6, 1e-6
        # Beyond 700 an exponential is too large for a float.
        lost = min(self.accuracy_weight * (self.least_accuracy - accuracy), 700.0)
        return (
            math.exp(lost)
            + self.communication_weight * micro * load.communication_seconds
            + self.local_time_weight * micro * load.local_seconds
            + self.host_time_weight * micro * load.host_seconds
            + self.local_params_weight * millions * load.local_params
            + self.host_params_weight * millions * load.host_params
        )


def check_fraction(name: str, value: float) -> float:
    """Return an accuracy that is a fraction.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        hint = "; divide per cent by 100" if isinstance(value, int | float) and 1 < value <= 100 else ""
        raise ValueError(f"{name} must be an accuracy of 0 to 1, got {value!r}{hint}")
    return float(value)
