"""A server of bundles over the Open Inference Protocol: one process on one machine, for any KServe or Triton client."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from ..checks import expect, is_finite
from .serving.batching import Batcher, Job
from .serving.handlers import Handlers
from .serving.metrics import Metrics, MetricsServer
from .serving.onward import Onward
from .serving.repository import Repository
from .serving.settings import MOST_MESSAGE_BYTES, check_server
from .serving.streams import Streams
from .trust import Trust, allowed
from .wire.protocol import SERVICE, described

_LOG = logging.getLogger(__name__)
# Threads for all that is no inference, so that a full queue still tells that it is alive.
_SPARE = 8
# Threads that a server begins with.
_AT_ONCE = 256
# Seconds for what is refused in the end to reach who asked.
_LAST = 0.25
# Seconds without a new call, before gRPC is stopped.
_QUIET = 0.1


class Server:
    """Serves the models of a repository until it is closed.

    Args:
        repository: What is served.
        host: Where it listens. Without a certificate only this machine itself, unless ``trust`` is insecure.
        port: The port; 0: any that is free.
        trust: Certificates and token.
        wait: Most seconds that a request waits for others to share a batch with, while nothing is computed; 0: it
            shares with those alone that wait already.
        queue: Most requests that wait; more are refused with RESOURCE_EXHAUSTED.
        workers: Threads that compute.
        streams: Most streams at once.
        message_bytes: Most bytes of a message; ``None``: what the largest bundle needs, served or in the repository.
        metrics_port: The port of Prometheus metrics, 0 for any; ``None``: none.
        metrics_host: Where that listens: metrics are plain HTTP, without TLS and token, for whoever can reach it.
        version: Its version, for its metadata.
        onward: The servers of placements behind this one: samples that go on are sent there, and answered from there.

    Attributes:
        port: The port that it listens on.
        metrics: What it counts.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: An argument is out of range, others could listen, or ``onward`` names a placement of no bundle.
        OSError: The port is in use.

    Example:
        >>> with Server(repository) as server:  # doctest: +SKIP
        ...     server.wait()
    """

    def __init__(
        self,
        repository: Repository,
        host: str = "127.0.0.1",
        port: int = 8001,
        trust: Trust | None = None,
        wait: float = 0.0,
        queue: int = 64,
        workers: int = 1,
        streams: int = 8,
        message_bytes: int | None = None,
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
        version: str = "",
        onward: Onward | None = None,
    ) -> None:
        expect("repository", repository, Repository, "make a Repository, and add the bundles to it")
        expect("trust", trust, (Trust, type(None)), "Trust(certificate=FILE, key=FILE) makes one")
        expect("onward", onward, (Onward, type(None)), 'Onward({"cloud": "HOST:8001"}) makes one')
        trust = Trust() if trust is None else trust
        samples = repository.samples
        check_server(
            host, port, trust, wait, queue, workers, streams, samples, message_bytes, metrics_port, metrics_host
        )
        if onward is not None and repository.folder is None:
            onward.check(repository.served)
        secret = trust.secret()
        limit = _message_limit(message_bytes, repository)
        self.repository, self.metrics = repository, Metrics()
        self._ended = threading.Event()
        self._batcher = Batcher(repository.samples, wait, queue, workers, self._batch)
        self._metrics_server: MetricsServer | None = None
        try:
            self._handlers = Handlers(repository, self._batcher, self.metrics, version, onward)
            self._streams = Streams(self._handlers, streams)
            threads = queue + workers * repository.samples + streams + _SPARE
            self._threads = _started(threads)
            self._server = grpc.server(
                self._threads,
                interceptors=[] if secret is None else [_Guard(secret, self.metrics)],
                maximum_concurrent_rpcs=threads,
                # Without the last, two servers would share a port, and answer by turns.
                options=[*_sizes(limit), ("grpc.so_reuseport", 0)],
            )
            self._server.add_generic_rpc_handlers([self._handlers.generic(self._streams)])
            self._health = _add_health(self._server)
            _add_reflection(self._server)
            self.port = self._bound(host, port, trust)
            if metrics_port is not None:
                self._metrics_server = MetricsServer(self.metrics, metrics_host, metrics_port)
        except BaseException:
            self._batcher.close()
            raise
        repository.message_bytes = limit
        self.metrics.gauges["cleave_queue_requests"] = ("Requests that wait.", lambda: self._batcher.waiting)
        self.host = host

    @property
    def metrics_port(self) -> int | None:
        """The port of the metrics, if there is one."""
        return None if self._metrics_server is None else self._metrics_server.port

    def _bound(self, host: str, port: int, trust: Trust) -> int:
        address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
        credentials = trust.server_credentials()
        try:
            if credentials is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {address}: the port is in use, or the host not this machine's; choose another"
            ) from error

    def _batch(self, jobs: Sequence[Job], seconds: float) -> None:
        if jobs:
            self.metrics.batch(jobs[0].model.name, sum(job.given.rows for job in jobs))

    def start(self) -> Server:
        """Begin to listen, and return the server."""
        self._server.start()
        _LOG.info("listening on %s port %d", self.host, self.port)
        return self

    def wait(self, asked: Callable[[], bool] | None = None) -> None:
        """Wait until the server is closed, or ``asked`` says that it should be."""
        while not self._ended.wait(0.1) and not (asked is not None and asked()):
            continue

    def drain(self, seconds: float = 30.0) -> bool:
        """Refuse what comes with UNAVAILABLE, answer what was accepted, and close.

        Args:
            seconds: Most seconds that it may take; what is not answered by then is refused too.

        Returns:
            Whether all that was accepted has been answered.

        Raises:
            ValueError: ``seconds`` is no positive number.
        """
        if not is_finite(seconds) or seconds <= 0:
            raise ValueError(f"grace must be a positive number of seconds, got {seconds!r}")
        end = time.monotonic() + seconds
        self._handlers.draining = True
        if self._health is not None:
            self._health.enter_graceful_shutdown()
        answered = self._batcher.drain(seconds)
        if not answered:
            # Nobody has to wait for what no answer comes to any more.
            self._batcher.abandon()
            self._handlers.idle(_LAST)
        self._handlers.ending.hold()
        self._streams.drain()
        answered = self._handlers.idle(max(end - time.monotonic(), 0.0)) and answered
        self._handlers.ending.quiet(_QUIET, max(min(end - time.monotonic(), 3.0), 0.0))
        # What has been answered may still be on its way to a socket.
        self.close(max(min(end - time.monotonic(), 1.0), _LAST))
        return answered

    def close(self, seconds: float | None = None) -> None:
        """Stop: at once, or once what is on its way has gone, at most ``seconds`` from now."""
        if self._ended.is_set():
            return
        self._handlers.draining = True
        stopped = self._server.stop(seconds)
        self._handlers.ending.release()
        self._batcher.close(seconds)
        stopped.wait()
        self._threads.shutdown(wait=False)
        if self._metrics_server is not None:
            self._metrics_server.close()
        if self._handlers.onward is not None:
            self._handlers.onward.close()
        self._ended.set()
        _LOG.info("stopped; requests by status: %s", self.metrics.counts())

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()


def _message_limit(asked: int | None, repository: Repository) -> int:
    limit = repository.needed_bytes() if asked is None else asked
    if limit > MOST_MESSAGE_BYTES:
        raise ValueError(
            f"messages of {limit / 2**20:.0f} MiB are more than gRPC carries; let a request have fewer samples than "
            f"samples={repository.samples}"
        )
    if (needed := max([0, *(model.most_bytes() for model in repository.served)])) > limit:
        raise ValueError(f"message_bytes={limit} is too little for what is served, which needs {needed}")
    return limit


def _started(count: int) -> ThreadPoolExecutor:
    """Return threads that run already, all of them where they are not very many.

    A pool makes a thread whenever more calls than ever come at once: under faults its memory grows for hours.
    """
    now = min(count, _AT_ONCE)
    pool, all_run = ThreadPoolExecutor(count, thread_name_prefix="grpc"), threading.Barrier(now + 1)
    for _ in range(now):
        pool.submit(all_run.wait)
    all_run.wait()
    return pool


def _sizes(limit: int) -> list[tuple[str, int]]:
    return [("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", limit)]


class _Guard(grpc.ServerInterceptor):
    """Lets nobody in without the token."""

    def __init__(self, secret: str, metrics: Metrics) -> None:
        self.secret, self.metrics = secret, metrics

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Return what handles a call."""
        handler = continuation(details)
        if handler is None or allowed(details.invocation_metadata, self.secret):
            return handler

        def refuse(request: Any, context: Any) -> Any:
            # What a stranger asks for is any client's word: it is not counted by itself.
            self.metrics.request("", "UNAUTHENTICATED", {})
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "the token is missing or wrong: send `authorization: Bearer TOKEN`, by Cleave's client with token=FILE",
            )

        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        kind = kinds[handler.request_streaming, handler.response_streaming]
        return kind(refuse, handler.request_deserializer, handler.response_serializer)


def _add_health(server: Any) -> Any:
    """Let gRPC's health service tell of this one, where its package is installed."""
    if importlib.util.find_spec("grpc_health") is None:
        return None
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    servicer = health.HealthServicer()
    servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


def _add_reflection(server: Any) -> None:
    """Let clients ask for the protocol, where the package for it is installed."""
    if importlib.util.find_spec("grpc_reflection") is None:
        return
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    files, names = [reflection_pb2.DESCRIPTOR.serialized_pb], [SERVICE, reflection.SERVICE_NAME]
    if importlib.util.find_spec("grpc_health") is not None:
        from grpc_health.v1 import health, health_pb2

        files.append(health_pb2.DESCRIPTOR.serialized_pb)
        names.append(health.SERVICE_NAME)
    pool = DescriptorPool()
    for content in (described().SerializeToString(), *files):
        pool.AddSerializedFile(content)
    reflection.enable_server_reflection(names, server, pool=pool)
