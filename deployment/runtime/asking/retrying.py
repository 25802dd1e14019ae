"""How often a client asks again, when it stops asking, and what it knows of its link."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ...checks import is_finite, is_whole
from ..wire.status import WORTH_RETRYING, ServingError

# What says that the server is away or cannot keep up, and nothing of the request.
AWAY = frozenset({*WORTH_RETRYING, "DEADLINE_EXCEEDED", "CANCELLED"})
_SAMPLES = 64
Answered = TypeVar("Answered")


@dataclasses.dataclass(frozen=True)
class Retries:
    """Tries of a request, with pauses that double, each of them shortened by chance so that clients spread.

    Args:
        timeout: Seconds for all tries together.
        attempts: Most tries.
        pause: Longest first pause in seconds.
        longest: Longest of all pauses.

    Raises:
        ValueError: An argument is out of range.
    """

    timeout: float = 5.0
    attempts: int = 4
    pause: float = 0.05
    longest: float = 2.0

    def __post_init__(self) -> None:
        for name in ("timeout", "pause", "longest"):
            value = getattr(self, name)
            if not is_finite(value) or not 0 < value <= 3600:
                raise ValueError(f"{name} must be a number of seconds, above 0 to 3600, got {value!r}")
        if not is_whole(self.attempts) or self.attempts < 1:
            raise ValueError(f"attempts must be a whole number of at least 1, got {self.attempts!r}")

    def run(
        self,
        call: Callable[[float], Answered],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        within: float = math.inf,
    ) -> tuple[Answered, int]:
        """Call until it is answered, and return the answer and how many tries that took.

        Args:
            call: Takes the seconds that are left; raises :class:`ServingError`.
            clock: Tells the time.
            sleep: Waits.
            within: Most seconds, where that is less than ``timeout``.

        Raises:
            ServingError: The last one of ``call``, with ``attempts`` noted: it says that another try would not help, or
                there was no time, or no try, left.
        """
        end = clock() + min(self.timeout, within)
        for attempt in range(1, self.attempts + 1):
            try:
                return call(max(end - clock(), 0.001)), attempt
            except ServingError as error:
                error.attempts = attempt
                wait = min(self.pause * 2 ** (attempt - 1), self.longest) * random.uniform(0.5, 1.0)
                if error.code not in WORTH_RETRYING or attempt == self.attempts or clock() + wait >= end:
                    raise
                sleep(wait)
        raise AssertionError("unreachable")


class Breaker:
    """Lets no request through for a while where several in a row have found the server away.

    Args:
        failures: How many.
        pause: Seconds for which none is let through. After that one is, and decides for the others.
        clock: Tells the time.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, failures: int = 5, pause: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        if not is_whole(failures) or failures < 1:
            raise ValueError(f"failures must be a whole number of at least 1, got {failures!r}")
        if not is_finite(pause) or pause <= 0:
            raise ValueError(f"pause must be a positive number of seconds, got {pause!r}")
        self.failures, self.pause, self._clock = failures, pause, clock
        self._lock = threading.Lock()
        self._failed = 0
        self._until = -math.inf

    def check(self, address: str = "the server") -> None:
        """Raise :class:`ServingError`, which names the address, where no request is let through now."""
        with self._lock:
            left = self._until - self._clock()
            if self._failed < self.failures:
                return
            if left > 0:
                raise ServingError(
                    "UNAVAILABLE",
                    f"{address} was away {self._failed} times in a row; it is asked again in {left:.1f} seconds",
                )
            # The one that tries; the others wait for what it finds.
            self._until = self._clock() + self.pause

    def note(self, code: str) -> None:
        """Note how a request ended."""
        with self._lock:
            self._failed = self._failed + 1 if code in AWAY else 0
            if self._failed >= self.failures:
                self._until = self._clock() + self.pause


class LinkEstimate:
    """Round trip and bandwidth of a link, from the requests that went over it.

    The seconds that a request spent on the link are taken as a round trip and its bytes over the bandwidth; the line
    through the last requests, by least squares, says both, once they differ in size.
    """

    def __init__(self) -> None:
        self._known: collections.deque[tuple[int, float]] = collections.deque(maxlen=_SAMPLES)
        self._lock = threading.Lock()

    def add(self, count: int, seconds: float) -> None:
        """Note a request of some bytes, and the seconds that it spent on the link."""
        with self._lock:
            self._known.append((count, max(seconds, 0.0)))

    @property
    def round_trip(self) -> float | None:
        """Seconds that a request of no bytes would take; ``None`` before the first."""
        with self._lock:
            known = list(self._known)
        if not known:
            return None
        line = _line(known)
        fastest = min(seconds for _, seconds in known)
        return fastest if line is None else min(max(line[0], 0.0), fastest)

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes that go over it in a second; ``None`` where sizes do not differ enough to tell."""
        with self._lock:
            line = _line(list(self._known))
        return None if line is None or line[1] <= 0 else 1 / line[1]


def _line(points: list[tuple[int, float]]) -> tuple[float, float] | None:
    """Return where a line through points begins and how steep it is; ``None`` where they stand above each other."""
    if len(points) < 2:
        return None
    count = len(points)
    x, y = (sum(point[i] for point in points) / count for i in (0, 1))
    spread = sum((a - x) ** 2 for a, _ in points)
    if spread < (0.01 * x) ** 2 * count or spread == 0:
        return None
    slope = sum((a - x) * (b - y) for a, b in points) / spread
    return y - slope * x, slope
