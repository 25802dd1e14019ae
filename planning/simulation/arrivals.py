"""When tasks come: at equal distances, at random, or as they were recorded."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

from cleave.architectures.naming import whole_number
from cleave.planning.profiles.checks import file_there, not_negative, positive
from cleave.planning.profiles.link import csv_rows


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
        ValueError: The rate is not above 0, the count no whole number of at least 1, or the seed none of at least 0.
    """
    positive("rate", rate, "tasks per second")
    whole_number("seed", seed, least=0)
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
    found = []
    for number, row in csv_rows(file):
        try:
            (time,) = map(float, row)
        except ValueError:
            raise ValueError(
                f"{file}, row {number}: each row must be a time in seconds, and nothing else; got {row}"
            ) from None
        found.append(time)
    ascending = all(a <= b for a, b in itertools.pairwise([0.0, *found]))
    if not found or not ascending or not math.isfinite(found[-1]):
        raise ValueError(f"{file} must hold times of tasks in seconds, from 0 on and ascending")
    return found
