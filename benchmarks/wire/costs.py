"""One request to our server against raw TCP, against KServe, and against no wire at all."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import torch

from cleave.deployment import Device, Side, load_bundle
from cleave.deployment.runtime.asking.remote import Sent
from cleave.deployment.runtime.wire.protocol import METHODS, message
from cleave.deployment.runtime.wire.tensors import add_input

from .bundles import BARE, FLOATS, make_bundle, process, quantile, received, say, serve_bare, serve_grpc, serve_tcp

PEER = Path(__file__).with_name("kserve_peer.py")
WORDS = {
    "floats": "0.8 MB of floats, a partition that does next to nothing",
    "packed": "a packed payload of 1 KB, a partition that does next to nothing",
    "tail": "0.8 MB of floats, layers 2 to 4 of a ResNet-18",
}
BARE_WAY = "gRPC, and nothing behind it"
Way = Callable[[], float]


def measure(kind: str, requests: int, warm_up: int, peers: str | None) -> None:
    """Print the milliseconds of each way, taking turns, so that all meet the machine in the same state."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = make_bundle(Path(name) / kind, kind)
        ways = own_ways(folder, stack)
        if peers is not None:
            ways |= peer_ways(peers, folder, kind, ways.pop("port"), stack)
        else:
            ways.pop("port")
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(requests + warm_up):
            for way, ask in ways.items():
                milliseconds = ask()
                if number >= warm_up:
                    spent[way].append(milliseconds)
    report(kind, requests, spent)


def timed(work: Callable[[], object]) -> Way:
    """Return what does the work and says the milliseconds that it took."""

    def way() -> float:
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)

    return way


def own_ways(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Return the ways without others, and the port of our server."""
    bundle = load_bundle(folder)
    device, server = Side(bundle, "device"), Side(bundle, "server")
    sent = device.run(torch.rand(1, *bundle.input.shape), request=0).messages["server"]
    payload = sent.payloads["cut"][0]
    _, port = stack.enter_context(process(serve_grpc, folder))
    _, tcp_port = stack.enter_context(process(serve_tcp, folder))
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", tcp_port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _, bare_port = stack.enter_context(process(serve_bare, b"\0" * 40))
    channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{bare_port}"))
    nothing = channel.unary_unary("/" + "/".join(BARE))
    client = stack.enter_context(Device(bundle, f"127.0.0.1:{port}"))
    client.connect()
    remote = client.remotes["server"]

    def by_tcp() -> None:
        connection.sendall(struct.pack("<I", len(payload)))
        connection.sendall(payload)
        received(connection, 40)

    return {
        "in process": timed(lambda: server.run(sent, request=0)),
        "raw TCP": timed(by_tcp),
        BARE_WAY: timed(lambda: nothing(payload, timeout=60)),
        "our client, our server": timed(lambda: remote.run(sent, Sent())),
        "port": port,
    }


def peer_ways(peers: str, folder: Path, kind: str, own_port: int, stack: contextlib.ExitStack) -> dict[str, Way]:
    """Return the ways with KServe: its client and its server, each also with ours at the other end."""
    bundle = load_bundle(folder)
    sent = Side(bundle, "device").run(torch.rand(1, *bundle.input.shape), request=0).messages["server"]
    payload = sent.payloads["cut"][0]
    content = payload
    if kind != "packed":
        opened = Side(bundle, "server").envelopes["cut", "server"].opened_all([payload])
        content = bundle.manifest.route.codecs["cut"].decode(opened)["z"].numpy().tobytes()
    file = folder.parent / "payload"
    file.write_bytes(content)
    # The model of its server decodes nothing, so its own time without a wire is what its server is compared with.
    count, model, port = int(kind != "packed"), f"{kind}.tail", free_ports()
    tail = [str(folder / "tail.pt")] if kind == "tail" else []
    server = subprocess.Popen([peers, PEER, "serve", str(port), model, *tail], **QUIET)
    stack.callback(ended, server)
    ask = bare(port, model, content, kind, server)
    by_peer, alone = asking([peers, str(PEER), "ask", f"127.0.0.1:{port}", model, str(file), str(count), *tail], stack)
    by_both, _ = asking([peers, str(PEER), "ask", f"127.0.0.1:{own_port}", model, str(file), str(count), *tail], stack)
    return {
        "KServe's model, in process": lambda: alone,
        "KServe's client, KServe's server": by_peer,
        "KServe's client, our server": by_both,
        "a bare call, KServe's server": timed(ask),
    }


QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def ended(process_: subprocess.Popen[Any]) -> None:
    process_.kill()
    process_.wait()


def free_ports() -> int:
    """Return a port that is free, and so most likely the next one."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def bare(port: int, model: str, content: bytes, kind: str, server: subprocess.Popen[Any]) -> Callable[[], object]:
    """Return a call of KServe's server by nothing but gRPC, once the server is there."""
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    known = METHODS["ModelInfer"]
    infer = channel.unary_unary(known.path, known.request.SerializeToString, known.response.FromString)
    tensor = torch.frombuffer(bytearray(content), dtype=torch.float32).view(1, *FLOATS) if kind != "packed" else None

    def call() -> object:
        request = message("ModelInferRequest")(model_name=model)
        if tensor is None:
            add_input(request, "payload", [content])
        else:
            add_input(request, "z", tensor)
        return infer(request, timeout=60).raw_output_contents[0]

    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit("KServe's server has ended; run kserve_peer.py by hand to see why")
        try:
            call()
            return call
        except grpc.RpcError:
            time.sleep(0.1)
    raise SystemExit("KServe's server does not answer")


def asking(command: list[str], stack: contextlib.ExitStack) -> tuple[Way, float]:
    """Return a request by KServe's client, which times itself, and the milliseconds of its model without a wire."""
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(ended, client)
    lines = answers(client)
    alone = next(float(line.split()[1]) for line in lines if line.startswith("ready"))

    def way() -> float:
        assert client.stdin is not None
        client.stdin.write("\n")
        client.stdin.flush()
        return float(next(lines).split()[0])

    return way, alone


def answers(client: subprocess.Popen[str]) -> Iterator[str]:
    """Yield what a client prints."""
    assert client.stdout is not None
    yield from client.stdout
    raise SystemExit("KServe's client has ended; run kserve_peer.py by hand to see why")


def report(kind: str, requests: int, spent: dict[str, list[float]]) -> None:
    say(f"\nOne request of {WORDS[kind]}; {requests} of each, in milliseconds")
    say(f"{'':33}{'p50':>9}{'p90':>9}{'p99':>9}{'p50 over in process':>22}")
    middle = {way: quantile(times, 0.5) for way, times in spent.items()}
    theirs = "KServe's model, in process"
    over = {way: at - middle[theirs if "KServe's server" in way else "in process"] for way, at in middle.items()}
    over.pop(theirs, None)
    # Nothing is computed there, so nothing is taken off.
    over[BARE_WAY] = bare = middle[BARE_WAY]
    for way, times in spent.items():
        values = "".join(f"{quantile(times, q):9.3f}" for q in (0.5, 0.9, 0.99))
        say(f"{way:33}{values}{f'{over[way]:.3f}' if way in over else '':>22}")
    if kind == "tail":  # the wire is lost in the spread of what is computed
        return
    own = over["our client, our server"]
    tcp = over["raw TCP"]
    say(f"over raw TCP: gRPC with nothing behind it {bare / tcp:.2f} times, ours {own / tcp:.2f} times")
    for other in ("KServe's client, KServe's server", "a bare call, KServe's server"):
        if other in over:
            decoded = middle["our client, our server"] / over[other]
            say(f"ours over {other}: {own / over[other]:.0%}, {decoded:.0%} with what our model does in process")
