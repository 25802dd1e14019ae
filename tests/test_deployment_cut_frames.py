"""Connections that end inside a frame of HTTP/2: no part of it is taken for a whole, and nothing stays."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import grpc
import pytest
import torch

from cleave.deployment import Device, Pipeline, Retries, ServingError, load_bundle

from .deployment_networks import images, make_bundle
from .serving_client import Caller, outputs_of, request_of, serving, until

AGAIN = Retries(timeout=60.0, attempts=20, pause=0.01, longest=0.05)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "net"
    make_bundle(folder, "sample")
    return load_bundle(folder)


@pytest.fixture
def served(bundle):
    with serving(bundle.directory) as (server, caller):
        yield server, caller
        # Whatever was cut, no call, stream or request is left, and the next one is answered.
        until(lambda: not server._server._state.rpc_states and not server._streams._open)
        assert server._handlers.idle(10.0)
        assert caller.infer(request(bundle)[0]).outputs


def request(bundle, seed=0):
    expected = Pipeline(bundle).run(images(1, seed=seed))
    return request_of("net.tail", {"payload": expected.payloads["cut"]}, id=str(seed)), expected.logits


class Scissors:
    """A port in front of another: cuts its first connection after some bytes of a direction, and no other one.

    ``left`` are the bytes until then, ``None``: it is not cut.
    """

    def __init__(self, port, direction=None, left=None):
        self.target, self.direction, self.left = port, direction, left
        self.bytes = {"up": 0, "down": 0}
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._end(self.listening, *self.sockets)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                first = not self.sockets
                self.sockets += [client, server]
                for name, source, sink in (("up", client, server), ("down", server, client)):
                    cut = first and name == self.direction
                    threading.Thread(target=self._pump, args=(name, source, sink, cut), daemon=True).start()

    def _pump(self, name, source, sink, cut):
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                left = self.left if cut else None
                sink.sendall(content[:left])
                self.bytes[name] += len(content[:left])
                if left is not None:
                    self.left = max(left - len(content), 0)
                    if not self.left:
                        break
        self._end(source, sink)

    @staticmethod
    def _end(*sockets):
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def through(link, bundle, retries):
    with Device(bundle, f"127.0.0.1:{link.port}", retries=retries) as device:
        return device.run(images(1))


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_request_whose_connection_is_cut_anywhere_is_asked_again(bundle, served, direction):
    server, _ = served
    expected = Pipeline(bundle).run(images(1)).logits
    with Scissors(server.port) as whole:
        through(whole, bundle, AGAIN)
    total = whole.bytes[direction]
    assert total > 200
    # Inside the preface, the settings, the frames of headers and data, and one byte before the end of them all.
    for count in (1, 7, 30, *(total * part // 10 for part in range(1, 10)), total - 1):
        with Scissors(server.port, direction, count) as link:
            assert torch.equal(through(link, bundle, AGAIN).result.logits, expected)
    # Before a call has begun gRPC may find another connection by itself; inside one it costs a try.
    once = Retries(timeout=60.0, attempts=1)
    with Scissors(server.port, direction) as link, Device(bundle, f"127.0.0.1:{link.port}", retries=once) as device:
        device.connect()
        link.left = 100  # inside the next request, or its answer: what HTTP/2 says in between is less
        with pytest.raises(ServingError) as error:
            device.run(images(1))
    assert error.value.code == "UNAVAILABLE"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_stream_that_is_cut_gives_whole_answers_and_then_a_status(bundle, served, direction):
    server, _ = served
    asked = {str(seed): request(bundle, seed) for seed in range(6)}

    def streamed(link):
        caller, found = Caller(link.port), {}
        try:
            for answer in caller.stub("ModelStreamInfer")(iter([each for each, _ in asked.values()]), timeout=60):
                assert not answer.error_message
                found[answer.infer_response.id] = outputs_of(answer.infer_response)["logits"]
            return found, "OK"
        except grpc.RpcError as error:
            return found, error.code().name
        finally:
            caller.channel.close()

    with Scissors(server.port) as whole:
        assert streamed(whole)[1] == "OK"
    codes = set()
    for part in range(1, 10):
        with Scissors(server.port, direction, whole.bytes[direction] * part // 10) as link:
            found, code = streamed(link)
        codes.add(code)
        for name, logits in found.items():
            torch.testing.assert_close(logits, asked[name][1], atol=1e-5, rtol=1e-5)
    assert "UNAVAILABLE" in codes
    assert codes <= {"UNAVAILABLE", "OK"}  # what follows the last answer is not needed


def frame(kind, flags, stream, content, claims=None):
    return (
        struct.pack(">I", len(content) if claims is None else claims)[1:]
        + struct.pack(">BBI", kind, flags, stream)
        + content
    )


def headers(path):
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "here", "te": "trailers"}
    fields["content-type"] = "application/grpc"
    # Each as a literal that no table keeps.
    return b"".join(
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields.items()
    )


DATA, HEADERS, SETTINGS, END_STREAM, END_HEADERS = 0, 1, 4, 1, 4


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
@pytest.mark.parametrize(
    "cut", ["nowhere", "in the frame", "in the message", "in the length", "in the headers", "half closed"]
)
def test_what_ends_inside_a_frame_is_no_request(bundle, served, method, cut):
    server, _ = served
    content = request(bundle)[0].SerializeToString()
    message = b"\0" + struct.pack(">I", len(content)) + content
    opening = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b"")
    head = frame(HEADERS, END_HEADERS, 1, headers(f"/inference.GRPCInferenceService/{method}"))
    last = {
        "nowhere": frame(DATA, END_STREAM, 1, message),
        "in the frame": frame(DATA, END_STREAM, 1, message[:40], claims=len(message)),
        "in the message": frame(DATA, END_STREAM, 1, message[:40]),
        "in the length": frame(DATA, END_STREAM, 1, message[:3]),
        "in the headers": b"",
        "half closed": frame(DATA, 0, 1, message[:40]),
    }[cut]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(opening + (head[:-9] if cut == "in the headers" else head) + last)
        if cut == "nowhere":  # what is whole is answered, so the others lack nothing else
            until(lambda: server.metrics.counts() == {"OK": 1})
            return
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):  # until the server hangs up, too
            pass
    assert server.metrics.counts() == {}
