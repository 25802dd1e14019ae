"""Jobs through machines in a row: Johnson's rule, and when everything is done."""

from __future__ import annotations

from collections.abc import Sequence


def johnson_order(jobs: Sequence[tuple[float, float]]) -> list[int]:
    """Order jobs of two stages so that the last is done as early as can be.

    Those that take less on the first machine come first, by that time; the others come last, by their time on the
    second, the longest first. After Johnson, "Optimal two- and three-stage production schedules with setup times
    included", 1954, theorem 1.

    Args:
        jobs: Seconds on the first and on the second machine.

    Returns:
        The numbers of the jobs in their order.

    Example:
        >>> johnson_order([(3, 1), (1, 4), (2, 2)])
        [1, 2, 0]
    """
    first = [i for i, (a, b) in enumerate(jobs) if a <= b]
    last = [i for i, (a, b) in enumerate(jobs) if a > b]
    return sorted(first, key=lambda i: jobs[i][0]) + sorted(last, key=lambda i: -jobs[i][1])


def completions(jobs: Sequence[Sequence[float]], delays: Sequence[float] = ()) -> list[float]:
    """Return when each job is done that runs through machines in a row, in the order given.

    A machine does one job at a time, and a job's next stage begins once its last is done and the machine is free. A
    stage of 0 seconds is passed at once, without waiting for its machine.

    Args:
        jobs: Seconds of each job on every machine.
        delays: Seconds between a machine and the next, where there are any; none for a job without a next stage.

    Example:
        >>> completions([(1, 4, 1), (1, 4, 1)])
        [6.0, 10.0]
    """
    free = [0.0] * max((len(job) for job in jobs), default=0)
    done = []
    for job in jobs:
        now = 0.0
        for machine, seconds in enumerate(job):
            if machine and machine <= len(delays) and any(job[machine:]):
                now += delays[machine - 1]
            if seconds > 0:
                now = free[machine] = max(now, free[machine]) + seconds
        done.append(now)
    return done


def makespan(jobs: Sequence[Sequence[float]], delays: Sequence[float] = ()) -> float:
    """Return when the last job is done; see :func:`completions`."""
    return max(completions(jobs, delays), default=0.0)
