"""A slow, uncertain link between real sockets, for tests and benchmarks: rate, delay, jitter and loss of connection."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..checks import is_finite

_CHUNK = 4096
_STEP = 0.05


class Trace:
    """The rate of a link over time: it holds from each time until the next, and begins anew at the end.

    Args:
        points: Pairs of seconds, which begin at 0 and rise, and bytes per second.
        period: Seconds after which it begins anew; ``None``: the last rate holds.

    Raises:
        ValueError: The points are not so.

    Example:
        >>> trace = Trace([(0.0, 100.0), (2.0, 50.0)], period=4.0)
        >>> trace.rate(1.0), trace.rate(3.0), trace.rate(5.0)
        (100.0, 50.0, 100.0)
    """

    def __init__(self, points: Sequence[tuple[float, float]], period: float | None = None) -> None:
        times = [at for at, _ in points]
        if not points or times[0] != 0 or times != sorted(set(times)) or not all(map(is_finite, times)):
            raise ValueError(f"the times of a trace must begin at 0 and rise, got {times[:8]}")
        if not all(is_finite(rate) and rate > 0 for _, rate in points):
            raise ValueError("the rates of a trace must be positive numbers of bytes per second")
        if period is not None and not (is_finite(period) and period > times[-1]):
            raise ValueError(f"period must be later than the last time, {times[-1]}, got {period!r}")
        self.points, self.period = list(points), period

    def rate(self, at: float) -> float:
        """Return the bytes per second at a time, in seconds from the start."""
        within = at if self.period is None else at % self.period
        return [rate for time_, rate in self.points if time_ <= within][-1]

    @classmethod
    def read(cls, file: str | Path, period: float | None = None) -> Trace:
        """Read a CSV file with the columns ``seconds`` and ``bytes_per_second``.

        Raises:
            ValueError: It has other columns or values; the message names the file.
        """
        with Path(file).open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        try:
            return cls([(float(row["seconds"]), float(row["bytes_per_second"])) for row in rows], period)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} must have the columns seconds and bytes_per_second: {error}") from error


@dataclasses.dataclass
class TokenBucket:
    """Lets bytes through at a rate, and so many at once after a pause.

    Args:
        trace: The rate.
        burst: Bytes that may go at once.
        clock: Tells the time.
    """

    trace: Trace
    burst: int = 16 * 1024
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._start = self._at = self.clock()
        self._tokens = float(self.burst)

    def wait(self, count: int) -> float:
        """Take the tokens of some bytes, and return the seconds after which they may go."""
        now = self.clock()
        rate = self.trace.rate(max(self._at, now) - self._start)
        self._tokens = min(self.burst, self._tokens + max(now - self._at, 0.0) * rate)
        self._at = max(self._at, now)
        self._tokens -= count
        return max(0.0, -self._tokens / rate)


@dataclasses.dataclass(frozen=True)
class LinkSettings:
    """What a link is like, in each of its two directions.

    Args:
        trace: Its rate.
        delay: Seconds that each byte takes, besides.
        jitter: Most seconds that are added to that by chance; the order of bytes stays.
        loss: Chance, for each 4 KiB, that the connection is lost.
        burst: Bytes that may go at once after a pause.
        chance: Seed of what is left to chance.

    Raises:
        ValueError: An argument is out of range.
    """

    trace: Trace
    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    burst: int = 16 * 1024
    chance: int = 0

    def __post_init__(self) -> None:
        for name in ("delay", "jitter"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise ValueError(f"{name} must be a number of seconds of at least 0, got {value!r}")
        if not is_finite(self.loss) or not 0 <= self.loss <= 1:
            raise ValueError(f"loss must be a chance, 0 to 1, got {self.loss!r}")
        if self.burst < 1:
            raise ValueError(f"burst must be at least 1 byte, got {self.burst!r}")


class EmulatedLink:
    """A port on this machine behind which another port lies, as far away as the settings say.

    Args:
        port: The port of the server behind it, on this machine.
        settings: What the link is like.
        clock: Tells the time.
        sleep: Waits.

    Attributes:
        port: The port that clients connect to.
        lost: How many connections were lost by chance.

    Example:
        >>> with EmulatedLink(8001, LinkSettings(Trace([(0, 125_000)]), delay=0.02)) as link:  # doctest: +SKIP
        ...     device = Device(bundle, f"127.0.0.1:{link.port}")
    """

    def __init__(
        self,
        port: int,
        settings: LinkSettings,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._target, self.settings, self._clock, self._sleep = port, settings, clock, sleep
        self._chance = random.Random(settings.chance)
        self._buckets = [TokenBucket(settings.trace, settings.burst, clock) for _ in range(2)]
        self._lock = threading.Lock()
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.lost = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(_STEP)
        self.port = int(self._listening.getsockname()[1])
        self._start(self._accept)

    def __enter__(self) -> EmulatedLink:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut all connections, and end."""
        self._closed = True
        self._listening.close()
        self.cut()
        for thread in list(self._threads):
            thread.join()

    def cut(self) -> None:
        """Cut all connections; new ones may come."""
        with self._lock:
            sockets, self._sockets = list(self._sockets), set()
        for each in sockets:
            _end(each)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="link", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listening.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                client.close()
                continue
            for each in (client, server):
                each.settimeout(None)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, server}
            for bucket, (source, target) in zip(self._buckets, ((client, server), (server, client)), strict=True):
                line: collections.deque[tuple[float, bytes]] = collections.deque()
                changed = threading.Condition()
                self._start(self._take, source, target, bucket, line, changed)
                self._start(self._give, source, target, line, changed)

    def _take(
        self,
        source: socket.socket,
        target: socket.socket,
        bucket: TokenBucket,
        line: collections.deque[tuple[float, bytes]],
        changed: threading.Condition,
    ) -> None:
        """Read at the link's rate, and note when each piece arrives; what has not been read, the sender must hold."""
        arrives = 0.0
        while True:
            try:
                content = source.recv(_CHUNK)
            except OSError:
                content = b""
            if content:
                with self._lock:
                    wait = bucket.wait(len(content))
                    lost = self._chance.random() < self.settings.loss
                    jitter = self._chance.uniform(0, self.settings.jitter)
                if lost:
                    self.lost += 1
                    _end(source)
                    _end(target)
                    content = b""
                elif wait > 0:
                    self._sleep(wait)
            arrives = max(arrives, self._clock() + self.settings.delay + (jitter if content else 0.0))
            with changed:
                line.append((arrives, content))
                changed.notify()
            if not content:
                return

    def _give(
        self,
        source: socket.socket,
        target: socket.socket,
        line: collections.deque[tuple[float, bytes]],
        changed: threading.Condition,
    ) -> None:
        """Pass on what has arrived."""
        while True:
            with changed:
                while not line:
                    changed.wait()
                at, content = line.popleft()
            if (left := at - self._clock()) > 0 and not self._closed:
                self._sleep(left)
            try:
                if content:
                    target.sendall(content)
                else:
                    target.shutdown(socket.SHUT_WR)
            except OSError:
                # Nobody is there any more, so nothing more is taken in.
                _end(source)
                _end(target)
                return
            if not content:
                return


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


def megabits(rate: float) -> Trace:
    """Return a trace of a steady rate in Mbit/s."""
    if not is_finite(rate) or rate <= 0 or math.isinf(rate):
        raise ValueError(f"the rate must be a positive number of Mbit/s, got {rate!r}")
    return Trace([(0.0, rate * 125_000)])
