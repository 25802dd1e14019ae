"""What a simulation came to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """A time in which a station works on an operation.

    Attributes:
        station: Number of the station in ``STAGES``.
        task: Number of the task.
        name: The operation's.
        start: When it begins, in seconds.
        end: When it ends.
    """

    station: int
    task: int
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """A stream of tasks through the four stations.

    Attributes:
        arrivals: When each task came.
        done: When each was done; NaN where it was turned away at a full queue.
        spans: What each station did, in the order in which it began.
        blocked: Seconds in which each station was done and could not hand on, as the next queue was full.
        up: Bytes up.
        down: Bytes back.
    """

    arrivals: tuple[float, ...]
    done: tuple[float, ...]
    spans: tuple[Span, ...]
    blocked: tuple[float, float, float, float]
    up: int
    down: int

    @property
    def lost(self) -> int:
        """Tasks that were turned away."""
        return sum(math.isnan(time) for time in self.done)

    @property
    def latencies(self) -> list[float]:
        """Seconds from arrival to answer of each task that was answered."""
        return [end - begin for begin, end in zip(self.arrivals, self.done, strict=True) if not math.isnan(end)]

    @property
    def length(self) -> float:
        """Seconds from the first arrival to the last answer."""
        ends = [time for time in self.done if not math.isnan(time)]
        return max(ends) - min(self.arrivals) if ends else 0.0

    @property
    def throughput(self) -> float:
        """Answers per second over that time."""
        return len(self.latencies) / self.length if self.length else math.inf

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each station worked."""
        return tuple(math.fsum(s.end - s.start for s in self.spans if s.station == station) for station in range(4))

    @property
    def idle(self) -> tuple[float, ...]:
        """Seconds that each station did not work, from the first arrival to the last answer."""
        return tuple(self.length - busy for busy in self.busy)

    def latency(self, quantiles: Sequence[float] = (0.5, 0.95, 0.99)) -> list[float]:
        """Return quantiles of the latency, linear between tasks.

        Raises:
            ValueError: A quantile is not from 0 to 1, or no task was answered.
        """
        if any(not 0 <= q <= 1 for q in quantiles):
            raise ValueError(f"quantiles must be from 0 to 1, got {list(quantiles)}")
        found = sorted(self.latencies)
        if not found:
            raise ValueError("no task was answered; there is no latency")
        return [_quantile(found, q) for q in quantiles]

    @property
    def mean_latency(self) -> float:
        """Mean seconds from arrival to answer."""
        return statistics.fmean(self.latencies)


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
