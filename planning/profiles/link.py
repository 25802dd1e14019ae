"""The link between a device and a server: constant rates, or a trace of them."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from cleave.planning.profiles.checks import file_there, not_negative, of_type, positive

MEGABIT = 1e6


@dataclass(frozen=True)
class RateTrace:
    """A rate that changes in steps.

    Attributes:
        times: Seconds, from 0 on, at which a rate begins; the last one is the end of the trace.
        rates: Mbit/s from each of these times to the next; one less than times. 0 is an outage.

    Raises:
        ValueError: Times do not ascend from 0, a rate is negative, or all are 0.

    Example:
        >>> trace = RateTrace((0.0, 1.0, 10.0), (8.0, 16.0))
        >>> trace.finish(0.0, 2e6)  # 1 MB in the first second, the rest at twice the rate
        1.5
    """

    times: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times) != len(self.rates) + 1 or len(self.times) < 2:
            raise ValueError(
                "a trace has a rate from each time to the next, and ends at its last time; got "
                f"{len(self.times)} times and {len(self.rates)} rates"
            )
        if self.times[0] != 0 or any(not a < b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError("the times of a trace must begin at 0 and ascend, in seconds")
        for rate, since in zip(self.rates, self.times, strict=False):
            not_negative(f"the rate at {since:g} s", rate, "Mbit/s", of="the trace")
        if not math.isfinite(self.times[-1]):
            raise ValueError(f"the times of a trace must be finite, in seconds; it ends at {self.times[-1]!r}")
        if not any(self.rates):
            raise ValueError("every rate of the trace is 0; give rates in Mbit/s")

    @property
    def mean(self) -> float:
        """Mbit/s over the whole trace."""
        spans = (b - a for a, b in zip(self.times, self.times[1:], strict=False))
        return math.fsum(rate * span for rate, span in zip(self.rates, spans, strict=True)) / self.times[-1]

    def finish(self, start: float, size: float) -> float:
        """Return when a transfer ends.

        Args:
            start: When it begins, in seconds.
            size: Bytes.

        Raises:
            ValueError: The trace ends before.
        """
        left, now = 8 * size, start
        if not left:
            return now
        for i in range(max(0, bisect_right(self.times, start) - 1), len(self.rates)):
            rate, end = MEGABIT * self.rates[i], self.times[i + 1]
            if rate and left <= rate * (end - now):
                return now + left / rate
            left -= rate * (end - now)
            now = end
        raise ValueError(
            f"the trace ends at {self.times[-1]:g} s, before the stream: a transfer of {size:,.0f} bytes that begins "
            f"at {start:.6g} s is not done by then; give a longer trace, or fewer tasks"
        )


@dataclass(frozen=True)
class Link:
    """What lies between a device and a server.

    Attributes:
        up: Mbit/s from the device to the server; ``None`` where a trace says it.
        down: Mbit/s back; ``None``: as up.
        round_trip: Seconds there and back of an empty message; half of it passes each way, and keeps nobody from
            sending.
        trace: The rate up as it changes, or a CSV file of it, see :func:`read_trace`; planners take its mean.

    Raises:
        ValueError: A rate is missing, 0 or negative; the message names it.
        FileNotFoundError: There is no such trace.

    Example:
        >>> link = Link(up=8.0, round_trip=0.02)
        >>> link.up_seconds(1_000_000), link.down_seconds(0)
        (1.0, 0.0)
    """

    up: float | None = None
    down: float | None = None
    round_trip: float = 0.0
    trace: RateTrace | str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.trace, str | Path):
            object.__setattr__(self, "trace", read_trace(self.trace))
        if self.trace is not None:
            of_type("trace", self.trace, RateTrace, "a RateTrace, the path of a CSV file, or None", of="the link")
        if isinstance(self.trace, RateTrace):
            if self.up is not None and self.up != self.trace.mean:  # which it is where a link is copied
                raise ValueError(f"up={self.up!r} and a trace both say the rate up; give one of them, the other null")
            object.__setattr__(self, "up", self.trace.mean)
        positive("up", self.up, "Mbit/s", of="the link")
        if self.down is None:
            object.__setattr__(self, "down", self.up)
        positive("down", self.down, "Mbit/s", of="the link")
        not_negative("round_trip", self.round_trip, "seconds", of="the link")

    @property
    def delay(self) -> float:
        """Seconds that a message is under way, one way."""
        return self.round_trip / 2

    def up_seconds(self, size: float) -> float:
        """Return the seconds that sending some bytes up takes, at the constant or mean rate."""
        assert self.up is not None
        return 8 * size / (MEGABIT * self.up)

    def down_seconds(self, size: float) -> float:
        """Return the seconds that sending some bytes back takes."""
        assert self.down is not None
        return 8 * size / (MEGABIT * self.down)

    def up_end(self, start: float, size: float) -> float:
        """Return when sending some bytes up ends that begins at ``start``; ValueError where the trace ends before."""
        return self.trace.finish(start, size) if isinstance(self.trace, RateTrace) else start + self.up_seconds(size)


def read_trace(file: Path | str) -> RateTrace:
    """Read a rate that changes: a CSV of time in seconds and rate in Mbit/s, with or without a header.

    A rate holds until the time of the next row; the last row's time is the end of the trace, and its rate is not used.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row has no two numbers, or times and rates are no trace.
    """
    file = file_there(file, "times and rates")
    numbers = []
    for number, row in csv_rows(file):
        if len(row) != 2 or not all(map(_is_number, row)):
            raise ValueError(f"{file}, row {number}: a trace has a time in seconds and a rate in Mbit/s; got {row}")
        numbers.append([float(cell) for cell in row])
    try:
        return RateTrace(tuple(row[0] for row in numbers), tuple(row[1] for row in numbers[:-1]))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def csv_rows(file: Path) -> list[tuple[int, list[str]]]:
    """Read the rows of a CSV file that are not empty, each with its number, but for a header of words.

    Raises:
        ValueError: The file is no text in UTF-8.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [(i, row) for i, row in enumerate(csv.reader(stream), 1) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8: {error}") from error
    # A cell of a header begins with a letter, and is none of the words that mean a number.
    words = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    header = bool(words) and all(word[:1].isalpha() and word not in ("nan", "inf", "infinity") for word in words)
    return rows[header:]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
