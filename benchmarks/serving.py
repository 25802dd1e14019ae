"""What the wire costs: one request to our server against raw TCP and against no wire at all.

The partition does next to nothing, so that what is measured is the way there: 0.8 MB of floats, and a packed payload of
1 KB. Each server is a process of its own; requests of all kinds take turns, so that all meet the machine in the same
state. Prints p50, p90 and p99 in milliseconds, and what is over the time in one process.

    python benchmarks/serving.py [--requests 500] [--warm-up 50]
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from cleave.deployment import (
    Device,
    Edge,
    FloatCodec,
    OutputSpec,
    Part,
    Repository,
    Server,
    Side,
    TensorInput,
    Transfer,
    UniformCodec,
    export_bundle,
    load_bundle,
)

FLOATS, CODES = (64, 56, 56), (2048,)
CLASSES = tuple(f"class {number}" for number in range(10))


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Pack(nn.Module):
    def forward(self, x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = x.flatten(1)[:, 0]
        codes = (x.clamp(0, 1) * (levels - 1)).round().to(torch.int32)
        return codes, torch.zeros_like(row), torch.ones_like(row)


class Few(nn.Module):
    """Reads a few numbers, whatever came."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10].float()


def make_bundle(folder: Path, packed: bool) -> Path:
    shape = CODES if packed else FLOATS
    codec = UniformCodec(shape, 4, 0.0, 1.0) if packed else FloatCodec(shape)
    sends = ("cut.codes", "cut.low", "cut.high") if packed else ("cut",)
    head = Part("head", "device", Pack() if packed else Scale(), ("x", *(("cut.levels",) if packed else ())), sends)
    tail = Part("tail", "server", Few(), ("cut.codes",) if packed else ("cut",), ("logits",))
    export_bundle(
        folder,
        [head, tail],
        [Edge("head", "tail", (Transfer("cut", codec),))],
        input=TensorInput(shape, "float32", "x"),
        outputs=(OutputSpec("logits", "logits", (10,), CLASSES),),
        images=torch.rand(4, *shape),
    )
    return folder


def serve_grpc(folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    repository = Repository()
    repository.add(folder)
    with Server(repository, port=0, metrics_port=0) as server:
        pipe.send(server.port)
        pipe.recv()


def serve_tcp(folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    side = Side(load_bundle(folder, placement="server"), "server")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pipe.send(listening.getsockname()[1])
        connection, _ = listening.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while head := connection.recv(4, socket.MSG_WAITALL):
                payload = received(connection, struct.unpack("<I", head)[0])
                message = side.message(torch.empty(1))._replace(payloads={"cut": [payload]})
                answer = side.run(message, request=0).outputs["logits"].numpy().tobytes()
                connection.sendall(answer)


def received(connection: socket.socket, count: int) -> bytes:
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count:
        done += connection.recv_into(view[done:])
    return bytes(content)


def started(work: Callable[[Path, Connection], None], folder: Path) -> tuple[multiprocessing.Process, Connection, int]:
    context = multiprocessing.get_context("spawn")
    own, theirs = context.Pipe()
    process = context.Process(target=work, args=(folder, theirs), daemon=True)
    process.start()
    return process, own, own.recv()


def measure(packed: bool, requests: int, warm_up: int, folder: Path) -> None:
    folder = make_bundle(folder, packed)
    bundle = load_bundle(folder)
    device, server = Side(bundle, "device"), Side(bundle, "server")
    message = device.run(torch.rand(1, *bundle.input.shape), request=0).messages["server"]
    payload = message.payloads["cut"][0]
    _, pipe, port = started(serve_grpc, folder)
    _, _, tcp_port = started(serve_tcp, folder)
    connection = socket.create_connection(("127.0.0.1", tcp_port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with Device(bundle, f"127.0.0.1:{port}") as client, connection:
        client.connect()
        remote = client.remotes["server"]
        from cleave.deployment.runtime.serving.remote import Sent

        def by_tcp() -> None:
            connection.sendall(struct.pack("<I", len(payload)))
            connection.sendall(payload)
            received(connection, 40)

        ways: dict[str, Callable[[], object]] = {
            "in process": lambda: server.run(message, request=0),
            "raw TCP": by_tcp,
            "our server": lambda: remote.run(message, Sent()),
        }
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(requests + warm_up):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if number >= warm_up:
                    spent[name].append(1000 * (time.perf_counter() - start))
    pipe.send(None)
    print(f"\nOne payload of {len(payload):,} bytes, {requests} requests, milliseconds")
    print(f"{'':12}{'p50':>9}{'p90':>9}{'p99':>9}{'p50 over in process':>22}")
    base = quantile(spent["in process"], 0.5)
    for name, times in spent.items():
        values = "".join(f"{quantile(times, q):9.3f}" for q in (0.5, 0.9, 0.99))
        print(f"{name:12}{values}{quantile(times, 0.5) - base:22.3f}")
    over = {name: quantile(times, 0.5) - base for name, times in spent.items()}
    print(f"our server over raw TCP: {over['our server'] / over['raw TCP']:.2f} times")


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for packed in (False, True):
            measure(packed, options.requests, options.warm_up, Path(folder) / ("packed" if packed else "floats"))


if __name__ == "__main__":
    main()
