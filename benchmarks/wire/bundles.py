"""Bundles whose partitions do next to nothing, or what a real tail does, and processes that serve them."""

from __future__ import annotations

import multiprocessing
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor, nn

from cleave.deployment import (
    Bundle,
    Codec,
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
BARE = ("bare.Bare", "Call")
KINDS = ("floats", "packed", "tail")


class Scale(nn.Module):
    """All that the device does to floats."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Pack(nn.Module):
    """Codes of what is between 0 and 1."""

    def forward(self, x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = x.flatten(1)[:, 0]
        codes = (x.clamp(0, 1) * (levels - 1)).round().to(torch.int32)
        return codes, torch.zeros_like(row), torch.ones_like(row)


class Few(nn.Module):
    """Reads a few numbers, whatever came."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10].float()


def real_tail(first: int) -> nn.Module:
    """Return a ResNet-18 from one of its four layers on."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    whole = resnet18(num_classes=len(CLASSES)).eval()
    layers = [getattr(whole, f"layer{number}") for number in range(first, 5)]
    return nn.Sequential(*layers, whole.avgpool, nn.Flatten(), whole.fc)


def make_bundle(folder: Path, kind: str) -> Path:
    """Export 0.8 MB of floats (``floats``; ``tail``: to most of a ResNet-18), or codes of 1 KB (``packed``)."""
    if kind == "packed":
        return exported(folder, UniformCodec(CODES, 4, 0.0, 1.0), Few())
    return exported(folder, FloatCodec(FLOATS), real_tail(2) if kind == "tail" else Few())


def exported(folder: Path, codec: Codec, tail: nn.Module) -> Path:
    """Export a device that does next to nothing, and what answers what it sends."""
    coded = isinstance(codec, UniformCodec)
    sends = ("cut.codes", "cut.low", "cut.high") if coded else ("cut",)
    parts = [
        Part("head", "device", Pack() if coded else Scale(), ("x", *(("cut.levels",) if coded else ())), sends),
        Part("tail", "server", tail, sends[:1], ("logits",)),
    ]
    export_bundle(
        folder,
        parts,
        [Edge("head", "tail", (Transfer("cut", codec),))],
        input=TensorInput(codec.shape, "float32", "x"),
        outputs=(OutputSpec("logits", "logits", (len(CLASSES),), CLASSES),),
        images=torch.rand(4, *codec.shape),
    )
    return folder


def slowed(bundle: Bundle, name: str, seconds: float) -> None:
    """Let a partition take longer, as a weaker machine would, without a core."""
    run = bundle.partitions[name]

    def slow(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(seconds)
        return run(arguments)

    bundle.partitions[name] = slow  # type: ignore[assignment]


def serve_grpc(pipe: Connection, folder: Path, seconds: float = 0.0, samples: int = 8, port: int = 0) -> None:
    """Serve a bundle until something comes."""
    torch.set_num_threads(1)
    repository = Repository(samples=samples, folder=folder.parent)
    for model in repository.add(folder):
        if seconds:
            slowed(model.bundle, model.spec.name, seconds)
    with Server(repository, port=port, metrics_port=0) as server:
        pipe.send(server.port)
        pipe.recv()


def serve_bare(pipe: Connection, answer: bytes) -> None:
    """Answer whatever comes over gRPC with the same bytes, and look at nothing: what no server over gRPC can save."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: answer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(BARE[0], {BARE[1]: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(port)
    pipe.recv()


def serve_tcp(pipe: Connection, folder: Path) -> None:
    """Answer payloads, each behind its length, over one bare connection."""
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
    """Return so many bytes."""
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count:
        done += connection.recv_into(view[done:])
    return bytes(content)


@contextmanager
def process(work: Callable[..., None], *arguments: Any) -> Iterator[tuple[multiprocessing.Process, int]]:
    """Run something in a process of its own; yield the process, and the port that it says."""
    context = multiprocessing.get_context("spawn")
    own, theirs = context.Pipe()
    started = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    started.start()
    try:
        yield started, own.recv()
    finally:
        started.kill()
        started.join()


def resident(pid: int) -> float:
    """Return the MiB of memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def quantile(values: list[float], share: float) -> float:
    """Return the value below which a share of them lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def say(line: str) -> None:
    """Print at once, also into a file."""
    print(line)
    sys.stdout.flush()
