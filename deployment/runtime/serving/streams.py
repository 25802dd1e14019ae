"""Requests that come in a stream: several are on their way at once, and each is answered as soon as it can be."""

from __future__ import annotations

import queue
import threading
from typing import Any

import grpc

from ..wire.protocol import message, set_parameters
from ..wire.status import ServingError
from .batching import Job
from .handlers import DRAINING, Handlers


class Streams:
    """The method that streams.

    Args:
        handlers: What a request means.
        most: Most streams at once.
        window: Most requests of a stream that are on their way at once. A client that reads no answers is not read.
    """

    def __init__(self, handlers: Handlers, most: int = 8, window: int = 16) -> None:
        self.handlers, self.most, self.window = handlers, most, window
        self._open: set[_Stream] = set()
        self._lock = threading.Lock()

    def __call__(self, requests: Any, context: Any) -> Any:
        """Answer a stream."""
        stream = _Stream(self.handlers, requests, context, self.window)
        with self._lock:
            full = len(self._open) >= self.most
            if not full:
                self._open.add(stream)
        if full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self.most} streams are open already; try again later")
        if self.handlers.draining:
            stream.drain()
        try:
            # Of a client that has gone gRPC takes no further answer, and this is left where it stands.
            if context.add_callback(lambda: self._closed(stream)):
                yield from stream.answers()
        finally:
            self._closed(stream)

    def _closed(self, stream: _Stream) -> None:
        with self._lock:
            self._open.discard(stream)

    def drain(self) -> None:
        """Let each stream end once all that it has asked is answered."""
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            stream.drain()


class _Stream:
    """One stream: a thread reads requests while gRPC's own takes answers."""

    def __init__(self, handlers: Handlers, requests: Any, context: Any, window: int) -> None:
        self.handlers, self.requests, self.context = handlers, requests, context
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(window)
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()
        self._gone = self._ended = self._draining = False
        self._due = 0

    def answers(self) -> Any:
        """Yield an answer, or what is wrong, for each request, in the order in which they are ready."""
        if not self.context.add_callback(self._leave):
            return
        reader = threading.Thread(target=self._read, name="stream", daemon=True)
        reader.start()
        try:
            while not (self._ended and not self._due):
                if self._draining and not self._due:
                    self._leave()
                    self.handlers.ending.pause()
                    self.context.abort(grpc.StatusCode.UNAVAILABLE, DRAINING)
                item = self._ready.get()
                if item is None:
                    continue
                yield self._answer(*item)
                self._settled()
        finally:
            self._leave()

    def drain(self) -> None:
        """End once nothing is due."""
        self._draining = True
        self._ready.put(None)

    def _answer(self, request: Any, job: Job | None, error: ServingError | None) -> Any:
        found = message("ModelStreamInferResponse")()
        try:
            if job is not None:
                answer = self.handlers.finished(request, job, lambda: self.handlers.respond(request, job))
                found.infer_response.CopyFrom(answer)
                return found
            code, words = ("INTERNAL", "the request has no answer") if error is None else (error.code, str(error))
        except ServingError as wrong:
            code, words = wrong.code, str(wrong)
        found.error_message = words
        found.infer_response.id = request.id
        set_parameters(found.infer_response.parameters, {"status": code})
        return found

    def _settled(self) -> None:
        """Note that an answer went out."""
        with self._lock:
            if self._gone:
                return
            self._due -= 1
        self.handlers.leave()
        self._room.release()

    def _read(self) -> None:
        try:
            while not self._gone:
                # Room first: what cannot be held is not read.
                self._room.acquire()
                request = None if self._gone else next(self.requests, None)
                if request is None:
                    break
                self._begin(request)
        except grpc.RpcError as error:  # the client has gone
            error.__traceback__ = None  # gRPC holds on to the error, and that to this frame
        finally:
            self._ended = True
            self._ready.put(None)

    def _begin(self, request: Any) -> None:
        with self._lock:
            if self._gone:
                return
            self._due += 1
            self.handlers.enter()

        def done(job: Job) -> None:
            with self._lock:
                self._jobs.discard(job)
            self._ready.put((request, job, None))

        try:
            job = self.handlers.begin(request, self.context, done)
        except ServingError as error:
            self._ready.put((request, None, error))
            return
        with self._lock:
            if job.result is None:
                self._jobs.add(job)
        if self._gone:
            job.cancel()

    def _leave(self) -> None:
        """Drop what nobody waits for any more."""
        with self._lock:
            if self._gone:
                return
            self._gone = True
            jobs, due, self._due = list(self._jobs), self._due, 0
            for _ in range(due):
                self.handlers.leave()
        for job in jobs:
            job.cancel()
        self._room.release()
        self._ready.put(None)
