"""Requests that wait, and the threads that answer them in batches."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...checks import is_finite, is_whole
from ...codecs.packing import CodecError
from ..wire.signatures import Given
from ..wire.status import ServingError, invalid
from ..wire.tensors import MOST_SAMPLES
from .models import Answer, Served

_LOG = logging.getLogger(__name__)


class Job:
    """One request on its way through the server.

    Args:
        model: What answers it. A model that is unloaded meanwhile still does.
        given: What it holds.
        deadline: When nobody waits for it any more, by :func:`time.monotonic`.
        done: Called once, when it has an answer or an error, from the thread that made it.
    """

    def __init__(
        self,
        model: Served,
        given: Given,
        deadline: float | None = None,
        done: Callable[[Job], None] | None = None,
    ) -> None:
        self.model, self.given, self.deadline = model, given, deadline
        self.key = (id(model), model.key(given))
        self.arrived = time.monotonic()
        self.started: float | None = None
        self.result: Answer | ServingError | None = None
        self._done, self._settled, self._lock = done, threading.Event(), threading.Lock()

    def settle(self, result: Answer | ServingError) -> bool:
        """Answer it, if it has no answer yet; return whether it had none."""
        with self._lock:
            if self.result is not None:
                return False
            self.result = result
            done, self._done = self._done, None
        self._settled.set()
        if done is not None:
            done(self)
        return True

    def cancel(self) -> None:
        """Let nobody compute it: the caller has gone."""
        self.settle(ServingError("CANCELLED", "the caller has cancelled the request"))

    def expire(self) -> None:
        """Let nobody compute it: its time is over."""
        self.settle(ServingError("DEADLINE_EXCEEDED", "the deadline passed before the request was answered"))

    def wait(self) -> Answer:
        """Return the answer.

        Raises:
            ServingError: There is none.
        """
        left = None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)
        if not self._settled.wait(left):
            self.expire()
        result = self.result
        if isinstance(result, Answer):
            return result
        if result is None:
            raise ServingError("INTERNAL", "the request has no answer")
        # Raised itself, it would hold on to this frame, and so to the request, until all of memory is searched.
        raise ServingError(result.code, str(result))


class Batcher:
    """A bounded queue, and threads that take requests out of it that can be computed together.

    Args:
        samples: Most samples of a batch.
        wait: Most seconds that a request waits for others while a thread is free; 0 takes what waits already.
        queue: Most requests that wait.
        workers: Threads that compute.
        on_batch: Told of each batch: its jobs, and the seconds that it took.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        samples: int = 8,
        wait: float = 0.0,
        queue: int = 64,
        workers: int = 1,
        on_batch: Callable[[Sequence[Job], float], None] | None = None,
    ) -> None:
        check_batching(samples, wait, queue, workers)
        self.samples, self.longest, self.most = samples, wait, queue
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._jobs: collections.deque[Job] = collections.deque()
        self._running: dict[int, list[Job]] = {}
        self._closed = self._ended = False
        self._threads = [threading.Thread(target=self._work, name=f"compute {i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Let a request wait for its turn.

        Raises:
            ServingError: The queue is full, or the server is about to stop.
        """
        with self._changed:
            if self._closed:
                raise ServingError("UNAVAILABLE", "the server is about to stop; ask another one, or this one later")
            if len(self._jobs) >= self.most:
                # Those that nobody waits for any more make room.
                self._jobs = collections.deque(each for each in self._jobs if each.result is None)
            if len(self._jobs) >= self.most:
                raise ServingError("RESOURCE_EXHAUSTED", f"{self.most} requests wait already; try again a little later")
            self._jobs.append(job)
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Take nothing more, and wait until all that was taken has an answer; return whether it has."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: not self._jobs and not self._running, seconds)

    def abandon(self) -> None:
        """Refuse what has no answer yet, that which is being computed too."""
        with self._changed:
            self._closed = True
            left = [*self._jobs, *(job for batch in self._running.values() for job in batch)]
            self._jobs = collections.deque()
            self._changed.notify_all()
        for job in left:
            job.settle(ServingError("UNAVAILABLE", "the server stopped before the request was answered"))

    def close(self, seconds: float | None = None) -> None:
        """Refuse what has no answer yet, and wait at most ``seconds`` for the threads, which nothing cuts short."""
        self.abandon()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if end is None else max(end - time.monotonic(), 0.0))

    def _work(self) -> None:
        while self._worked():
            continue

    def _worked(self) -> bool:
        """Compute what comes next, and keep nothing of it; return whether anything did."""
        batch = self._next()
        if batch is None:
            return False
        try:
            self._compute(batch)
        finally:
            with self._changed:
                del self._running[id(batch)]
                self._changed.notify_all()
        return True

    def _next(self) -> list[Job] | None:
        """Wait for requests that go together; ``None``: there will be none."""
        with self._changed:
            while True:
                while not self._jobs and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return None
                first = self._jobs[0]
                if not _wanted(first):
                    self._jobs.popleft()
                    self._changed.notify_all()
                    continue
                left = first.arrived + self.longest - time.monotonic()
                if left > 0 and self._ready(first) < self.samples and not self._closed:
                    self._changed.wait(left)
                    continue
                batch = self._taken(first)
                self._running[id(batch)] = batch
                return batch

    def _ready(self, first: Job) -> int:
        return sum(job.given.rows for job in self._jobs if job.key == first.key)

    def _taken(self, first: Job) -> list[Job]:
        """Take the first request, and all that go with it, in their order."""
        batch: list[Job] = []
        rest: collections.deque[Job] = collections.deque()
        rows, full = 0, False
        for job in self._jobs:
            fits = not full and job.key == first.key and (not batch or rows + job.given.rows <= self.samples)
            if not fits:
                # Nobody overtakes another of its kind.
                full = full or job.key == first.key
                rest.append(job)
            elif _wanted(job):
                batch.append(job)
                rows += job.given.rows
        self._jobs = rest
        return batch

    def _compute(self, batch: Sequence[Job]) -> None:
        start = time.monotonic()
        for job in batch:
            job.started = start
        answers = _answered(batch)
        seconds, rows = time.monotonic() - start, sum(job.given.rows for job in batch)
        for job, answer in zip(batch, answers, strict=True):
            done = Answer(answer.outputs, seconds, rows) if isinstance(answer, Answer) else answer
            job.settle(done)
        if self._on_batch is not None:
            self._on_batch(batch, seconds)


def _wanted(job: Job) -> bool:
    """Whether anybody still waits for a request."""
    if job.result is None and job.deadline is not None and job.deadline <= time.monotonic():
        job.expire()
    return job.result is None


def _answered(batch: Sequence[Job]) -> list[Answer | ServingError]:
    """Compute a batch; where it fails as a whole, each of its requests alone, so that one cannot spoil the others."""
    try:
        return batch[0].model.run([job.given for job in batch]) if batch else []
    except Exception as error:
        if len(batch) > 1:
            return [answer for job in batch for answer in _answered([job])]
        return [_error_of(error)]


def _error_of(error: Exception) -> ServingError:
    if isinstance(error, ServingError):
        return error
    if isinstance(error, (CodecError, ValueError)):  # a bundle's errors among them: they name what does not fit
        return invalid(str(error))
    _LOG.error("a request could not be computed", exc_info=error)
    return ServingError("INTERNAL", f"the request could not be computed: {type(error).__name__}: {error}")


def check_batching(samples: Any, wait: Any, queue: Any, workers: Any) -> None:
    """Raise :class:`ValueError` where a setting of :class:`Batcher` is out of range."""
    for name, value, most in (("samples", samples, MOST_SAMPLES), ("queue", queue, None), ("workers", workers, None)):
        if not is_whole(value) or value < 1 or (most is not None and value > most):
            limits = "of at least 1" if most is None else f"from 1 to {most}"
            raise ValueError(f"{name} must be a whole number {limits}, got {value!r}")
    if not is_finite(wait) or not 0 <= wait <= 60:
        raise ValueError(f"wait must be 0 to 60 seconds, got {wait!r}")


def checked_threads(workers: Any, threads: Any, cores: int) -> None:
    """Raise :class:`ValueError` where threads that compute would take more cores than there are."""
    for name, value in (("workers", workers), ("threads", threads)):
        if not is_whole(value) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if workers * threads > cores:
        raise ValueError(
            f"workers={workers} of threads={threads} each would share {cores} cores, and all be slower for it; keep "
            f"workers · threads at {cores} or less"
        )
