"""The protocol by hand, as tests of servers speak it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import torch

from cleave.deployment import Retries, Server
from cleave.deployment.runtime.serving.repository import Repository
from cleave.deployment.runtime.wire.protocol import METHODS, message, set_parameters
from cleave.deployment.runtime.wire.tensors import add_input, split

# For answers that must come, however busy the machine is.
PATIENT = Retries(timeout=120.0)
DTYPES = {"FP32": torch.float32, "INT64": torch.int64, "INT32": torch.int32, "UINT8": torch.uint8}


class Caller:
    """A client without any wit."""

    def __init__(self, port: int, token: str | None = None, credentials: Any = None, host: str = "127.0.0.1") -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        # Without this, channels of one process to one address share a connection.
        options.append(("grpc.use_local_subchannel_pool", 1))
        address = f"{host}:{port}"
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options)
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)

    def stub(self, method: str) -> Any:
        known = METHODS[method]
        kind = self.channel.stream_stream if known.streams else self.channel.unary_unary
        return kind(known.path, known.request.SerializeToString, known.response.FromString)

    def __call__(self, method: str, /, timeout: float = 60.0, **fields: Any) -> Any:
        return self.stub(method)(METHODS[method].request(**fields), timeout=timeout, metadata=self.metadata)

    def infer(self, request: Any, timeout: float | None = 60.0) -> Any:
        return self.stub("ModelInfer")(request, timeout=timeout, metadata=self.metadata)

    def status(self, request: Any, timeout: float = 60.0) -> tuple[str, str]:
        """Status and words of a request."""
        try:
            self.infer(request, timeout)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""


def request_of(model: str, inputs: dict[str, Any], parameters: dict[str, Any] | None = None, **fields: Any) -> Any:
    request = message("ModelInferRequest")(model_name=model, **fields)
    for name, content in inputs.items():
        add_input(request, name, content)
    set_parameters(request.parameters, parameters or {})
    return request


def outputs_of(response: Any) -> dict[str, Any]:
    found = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            found[output.name] = split(raw, output.shape[0])
        else:
            found[output.name] = torch.frombuffer(bytearray(raw), dtype=DTYPES[output.datatype]).view(*output.shape)
    return found


@contextlib.contextmanager
def serving(*folders: Any, repository: Repository | None = None, **settings: Any) -> Iterator[tuple[Server, Caller]]:
    """A server of some bundles on a free port, and who calls it."""
    repository = Repository() if repository is None else repository
    for folder in folders:
        repository.add(folder)
    server = Server(repository, port=0, **settings)
    with server:
        caller = Caller(server.port)
        try:
            yield server, caller
        finally:
            caller.channel.close()


def ask_on(ask: Callable[[], Iterable[Any]], answered: list[Any], refused: list[str], stop: threading.Event) -> None:
    """Ask without a pause, until told to stop; note the answers, and the statuses of those that were refused."""
    while not stop.is_set():
        try:
            answered.extend(ask())
        except grpc.RpcError as error:
            refused.append(error.code().name)


def until(condition: Any) -> None:
    """Wait for what other threads do."""
    for _ in range(12000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come about")


class Gate:
    """Holds a model's computing until it is opened; ``held`` are the requests of its last batch."""

    def __init__(self, model):
        self.reached, self.open, self.sizes, self._run = threading.Event(), threading.Event(), [], model.run
        self.held = 0
        model.run = self

    def __call__(self, given):
        self.held = len(given)
        self.reached.set()
        self.open.wait(120)
        self.sizes.append([each.rows for each in given])
        return self._run(given)
