"""What the server does with each method of the protocol."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from ..wire.protocol import METHODS, SERVICE, STREAM, message, set_parameters
from ..wire.status import ServingError, invalid
from ..wire.tensors import Field, add_output
from .batching import Batcher, Job
from .ending import Ending
from .metrics import Metrics
from .models import Answer, Served
from .onward import Onward
from .repository import Repository

_LOG = logging.getLogger(__name__)
NAME, EXTENSIONS = "cleave", ("model_repository",)
PLATFORM = "pytorch_torchscript"
_LONGEST = 24 * 3600.0
DRAINING = "the server is about to stop; ask another one, or this one later"


class Handlers:
    """The methods of the Open Inference Protocol over a repository of models.

    Args:
        repository: The models.
        batcher: What computes.
        metrics: What is counted.
        version: The server's version, for its metadata.
        onward: The servers of placements behind this one, if any.

    Attributes:
        draining: Whether what comes is refused.
        ending: What holds refusals while the server stops.
    """

    def __init__(
        self, repository: Repository, batcher: Batcher, metrics: Metrics, version: str, onward: Onward | None = None
    ) -> None:
        self.onward = onward
        self.repository, self.batcher, self.metrics, self.version = repository, batcher, metrics, version
        self.draining, self.ending = False, Ending()
        # Each thread that has loaded or freed a model keeps memory of its own for that, so it is always the same one.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._changed = threading.Condition()
        self._active = 0

    def generic(self, stream: Callable[[Any, Any], Any]) -> Any:
        """Return the handler of the service that gRPC registers; ``stream`` is that of the one method that streams."""
        own = {
            "ServerLive": lambda request: message("ServerLiveResponse")(live=True),
            "ServerReady": lambda request: message("ServerReadyResponse")(ready=not self.draining),
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "ModelMetadata": self.model_metadata,
            "RepositoryIndex": self.index,
            "RepositoryModelLoad": self.load,
            "RepositoryModelUnload": self.unload,
        }
        found = {}
        for name, method in METHODS.items():
            ends = {
                "request_deserializer": method.reads,
                "response_serializer": method.response.SerializeToString,
            }
            if name == STREAM:
                found[name] = grpc.stream_stream_rpc_method_handler(stream, **ends)
            else:
                behaviour = self.infer if name == "ModelInfer" else self._guarded(own[name])
                found[name] = grpc.unary_unary_rpc_method_handler(behaviour, **ends)
        return grpc.method_handlers_generic_handler(SERVICE, found)

    def _guarded(self, behaviour: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def guarded(request: Any, context: Any) -> Any:
            self.ending.pause()
            try:
                return behaviour(request)
            except ServingError as error:
                return context.abort(getattr(grpc.StatusCode, error.code), str(error))

        return guarded

    def server_metadata(self, request: Any) -> Any:
        """Say what this server is."""
        return message("ServerMetadataResponse")(name=NAME, version=self.version, extensions=EXTENSIONS)

    def model_ready(self, request: Any) -> Any:
        """Say whether a model is served."""
        try:
            self.repository.get(request.name, request.version)
        except ServingError:
            return message("ModelReadyResponse")(ready=False)
        return message("ModelReadyResponse")(ready=not self.draining)

    def model_metadata(self, request: Any) -> Any:
        """Say what a model takes and answers, and of which bundle it is."""
        model = self.repository.get(request.name, request.version)
        found = message("ModelMetadataResponse")(name=model.name, platform=PLATFORM, properties=model.properties)
        found.versions.extend(map(str, self.repository.versions(model.name)))
        for into, fields in ((found.inputs, model.inputs), (found.outputs, self._outputs(model))):
            for field in fields.values():
                into.add(name=field.name, datatype=field.datatype, shape=field.shape)
        return found

    def _outputs(self, model: Served) -> Mapping[str, Field]:
        """Return what a model may answer, with what comes from placements behind this one."""
        return model.outputs if self.onward is None else model.answers

    def index(self, request: Any) -> Any:
        """List the models that are served, and the bundles that could be."""
        found = message("RepositoryIndexResponse")()
        for each in self.repository.index(request.ready):
            state = "READY" if each.ready else "UNAVAILABLE"
            found.models.add(name=each.name, version=str(each.version), state=state, reason=each.reason)
        return found

    def load(self, request: Any) -> Any:
        """Serve a bundle of the repository."""
        self._loader.submit(self.repository.load, _named(request)).result()
        return message("RepositoryModelLoadResponse")()

    def unload(self, request: Any) -> Any:
        """Serve a bundle no longer."""
        self._loader.submit(self.repository.unload, _named(request)).result()
        return message("RepositoryModelUnloadResponse")()

    def infer(self, request: Any, context: Any) -> Any:
        """Answer a request."""
        self.enter()
        try:
            job = self.begin(request, context)
            context.add_callback(job.cancel)
            return self.finished(request, job, lambda: self.respond(request, job))
        except ServingError as error:
            code, words = error.code, str(error)
        except Exception as error:
            _LOG.exception("a request failed")
            code, words = "INTERNAL", f"{type(error).__name__}: {error}"[:1000]
        finally:
            self.leave()
        self.ending.pause()
        return context.abort(getattr(grpc.StatusCode, code), words)

    def begin(self, request: Any, context: Any, done: Callable[[Job], None] | None = None) -> Job:
        """Read a request and let it wait for its turn; :class:`ServingError` where it is refused."""
        job = None
        try:
            model = self.repository.get(request.model_name, request.model_version)
            _check_digest(request, model.digest)
            given = model.read(request)
            known = self._outputs(model)
            if unknown := [each.name for each in request.outputs if each.name not in known]:
                raise invalid(f"{model.name} has no output {unknown[0]!r:.100}; it has {', '.join(known)}")
            # A call without a deadline has centuries left, more than a lock can wait.
            limits = [limit for limit in (context.time_remaining(), given.timeout, _LONGEST) if limit is not None]
            job = Job(model, given, time.monotonic() + min(limits), done)
            if self.draining:
                raise ServingError("UNAVAILABLE", DRAINING)
            self.batcher.submit(job)
            return job
        except ServingError as error:
            # A name that nobody serves is any client's word: it is not counted by itself.
            self.told("" if job is None else job.model.name, request, error.code, {})
            raise

    def finished(self, request: Any, job: Job, respond: Callable[[], Any]) -> Any:
        """Return a response, and count how the request ended."""
        status = "INTERNAL"
        try:
            response = respond()
            status = "OK"
            return response
        except ServingError as error:
            status = error.code
            raise
        finally:
            now = time.monotonic()
            stages = {"total": now - job.arrived}
            if job.started is not None:
                stages["wait"] = job.started - job.arrived
            if isinstance(job.result, Answer):
                stages["compute"] = job.result.seconds
            self.told(job.model.name, request, status, stages)

    def respond(self, request: Any, job: Job) -> Any:
        """Return the response to a request, once it has an answer, and the placements behind have theirs."""
        answer = job.wait()
        if self.onward is not None:
            left = math.inf if job.deadline is None else job.deadline - time.monotonic()
            answer = self.onward.finished(job.model, job.given, answer, left)
        return respond(request, job, answer)

    def told(self, model: str, request: Any, status: str, stages: dict[str, float]) -> None:
        """Count a request, and log it as one line of JSON where somebody debugs."""
        self.metrics.request(model, status, stages)
        if _LOG.isEnabledFor(logging.DEBUG):
            milliseconds = {stage: round(1000 * spent, 3) for stage, spent in stages.items()}
            line = {"model": request.model_name[:200], "id": request.id[:200], "status": status, "ms": milliseconds}
            _LOG.debug("%s", json.dumps(line))

    def enter(self) -> None:
        """Note that an answer is due."""
        with self._changed:
            self._active += 1

    def leave(self) -> None:
        """Note that an answer was given."""
        with self._changed:
            self._active -= 1
            self._changed.notify_all()

    def idle(self, seconds: float) -> bool:
        """Wait until no answer is due any more; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._active, seconds)


def respond(request: Any, job: Job, answer: Answer) -> Any:
    """Return a response: all outputs, or those that were asked for."""
    response = message("ModelInferResponse")(model_name=job.model.name, model_version=str(job.model.version))
    response.id = request.id
    asked = [each.name for each in request.outputs]
    for name, content in answer.outputs.items():
        if not asked or name in asked:
            add_output(response, name, content)
    if missing := [name for name in asked if name not in answer.outputs]:
        raise ServingError(
            "NOT_FOUND", f"there is no {', '.join(missing)} of these samples; ask for it where it arises"
        )
    wait = 0.0 if job.started is None else job.started - job.arrived
    set_parameters(
        response.parameters, {"wait_seconds": wait, "compute_seconds": answer.seconds, "batch": answer.batch}
    )
    return response


def _named(request: Any) -> str:
    # KServe's own definition has the model's name where the others have the repository's.
    return request.model_name or request.repository_name


def _check_digest(request: Any, own: str) -> None:
    """Raise where a client says that it has another bundle."""
    if "digest" in request.parameters and (found := request.parameters["digest"].string_param) != own:
        raise ServingError(
            "FAILED_PRECONDITION",
            f"the client has the bundle {found[:64]}, this server {own}; give both sides the same bundle",
        )
