"""When tasks come: at equal distances, at random, or as they were recorded."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path

from cleave.architectures.naming import whole_number
from cleave.planning.profiles.checks import file_there, not_negative, positive


def every(seconds: float, count: int) -> list[float]:
    """Return the times of tasks at equal distances, from 0.

    Raises:
        ValueError: The distance is negative, or the count no whole number of at least 1.
    """
    not_negative("every", seconds, "seconds between tasks")
    return [i * seconds for i in range(whole_number("count", count))]


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Return the times of tasks that come at random.

    Args:
        rate: Tasks per second in the mean.
        count: How many.
        seed: Of the draws.

    Raises:
        ValueError: The rate is not above 0, or the count no whole number of at least 1.
    """
    positive("rate", rate, "tasks per second")
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(whole_number("count", count)):
        now += draw.expovariate(rate)
        found.append(now)
    return found


def read_arrivals(file: Path | str) -> list[float]:
    """Read the times of tasks in seconds, one a row, with or without a header.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row is no time, or the times do not ascend.
    """
    file = file_there(file, "times of arrival")
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row[0] for row in csv.reader(stream) if row]
    try:
        found = [float(cell) for cell in rows[not rows[0][:1].isdigit() :]] if rows else []
    except ValueError as error:
        raise ValueError(f"{file}: each row must be a time in seconds: {error}") from error
    if not found or any(b < a for a, b in itertools.pairwise(found)) or found[0] < 0:
        raise ValueError(f"{file} must hold times of tasks in seconds, from 0 on and ascending")
    return found
