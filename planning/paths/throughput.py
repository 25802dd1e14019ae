"""Throughput of a service that sends part of its images over a path through another one."""

from __future__ import annotations

import math
from dataclasses import dataclass

ROUNDING = 1e-9


@dataclass(frozen=True)
class Throughput:
    """Images per second that a local service finishes with the help of a path.

    Attributes:
        original: Th_0: of the local network alone.
        local: Th_l: images that the local network answers alone, in the time that the path leaves to it.
        path: Th_h: images that take the path.
    """

    original: float
    local: float
    path: float

    @property
    def total(self) -> float:
        """Th_p = Th_l + Th_h."""
        return self.local + self.path

    @property
    def ratio(self) -> float:
        """Th_p / Th_0: 1 is what the local network does alone."""
        return self.total / self.original

    @property
    def gains(self) -> bool:
        """Whether it is above that of the local network alone, by more than rounding."""
        return self.ratio > 1 + ROUNDING

    def average_accuracy(self, original: float, path: float) -> float:
        r"""Return the accuracy over all images, those of the path and those that the local network answers alone.

        .. math:: A_{av} = \frac{Th_l \cdot A_0 + Th_h \cdot A_p}{Th_p}

        Args:
            original: A_0: accuracy of the local network.
            path: A_p: accuracy of the path.
        """
        return (self.local * original + self.path * path) / self.total


def original_throughput(seconds: float) -> Throughput:
    """Return the throughput of a local network that sends nothing away.

    Args:
        seconds: τ_0: its time per image.

    Raises:
        ValueError: The time is not above 0.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"the local network's time must be a number of seconds above 0, got {seconds!r}")
    return Throughput(1 / seconds, 1 / seconds, 0.0)


def path_throughput(
    original_seconds: float,
    local_seconds: float,
    host_seconds: float,
    *,
    local_share: float = 1.0,
    host_share: float = 1.0,
) -> Throughput:
    r"""Return the throughput of a local service with a path.

    After "Edge AI as a Service with Coordinated Deep Neural Networks" (2024):

    .. math::
        Th_0 = \frac{1}{\tau_0}, \quad Th_h = \min\left(\frac{\rho}{\tau_l}, \frac{\varphi}{\tau_h}\right), \quad
        Th_l = (1 - Th_h \tau_l) \cdot Th_0, \quad Th_p = Th_l + Th_h

    Both sides always have images to work on. The path gets as many as the slower of the two sides can take; in the time
    that is left, the local network answers others alone.

    Args:
        original_seconds: τ_0: time per image of the local network alone.
        local_seconds: τ_l: time per image that goes over the path, on the local side.
        host_seconds: τ_h: the same on the host; 0 for a skip-connection, which has no host.
        local_share: ρ: largest share of the local side's time that the path may have.
        host_share: φ: share of the host's time that is left to guests.

    Raises:
        ValueError: A time is negative, all are 0, or a share is not within 0 to 1.

    Example:
        >>> found = path_throughput(1.0, 0.503, 1.242)
        >>> round(found.local, 3), round(found.path, 3), round(found.ratio, 2)
        (0.595, 0.805, 1.4)
        >>> round(found.average_accuracy(0.867, 0.827), 3)
        0.844
    """
    alone = original_throughput(original_seconds).original
    for name, seconds in (("local_seconds", local_seconds), ("host_seconds", host_seconds)):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{name} must be a number of at least 0, got {seconds!r}")
    for name, share in (("local_share", local_share), ("host_share", host_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share of 0 to 1, got {share!r}")
    limits = [
        share / seconds for share, seconds in ((local_share, local_seconds), (host_share, host_seconds)) if seconds > 0
    ]
    if not limits:
        raise ValueError("local_seconds and host_seconds are both 0; a path takes some time on one of the two sides")
    path = min(limits)
    # Rounding must not leave the local network less than no time.
    return Throughput(alone, max(0.0, 1 - path * local_seconds) * alone, path)
