"""Streams of tasks over slow links: throughput against the slowest stage, a lone task against the sum of its stages."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cleave.deployment import Device, FloatCodec, Retries, Side, UniformCodec, load_bundle
from cleave.deployment.runtime.asking.remote import Sent
from cleave.deployment.runtime.emulated_link import EmulatedLink, LinkSettings, megabits

from .bundles import Few, exported, process, quantile, real_tail, say, serve_grpc, slowed

DELAY = 0.01
# Mbit/s, floats of a sample, and seconds on device and server: the link is the slowest stage, then each of the others.
CASES = (
    (5.0, 15_625, 0.02, 0.02),
    (20.0, 62_500, 0.02, 0.02),
    (100.0, 200_704, 0.02, 0.02),
    (20.0, 25_000, 0.08, 0.02),
    (20.0, 25_000, 0.02, 0.08),
)
RETRIES = Retries(timeout=60.0)


def link(pipe: Connection, port: int, rate: float, delay: float, burst: int) -> None:
    """Be a link until something comes."""
    with EmulatedLink(port, LinkSettings(megabits(rate), delay=delay, burst=burst)) as emulated:
        pipe.send(emulated.port)
        pipe.recv()


def tasks(count: int) -> None:
    """Print, for each case, what a stream and a lone task come to, and what their stages say."""
    say(f"\nStreams of {count} tasks, {1000 * DELAY:g} ms each way; what the stages say, and what was measured")
    stages = "".join(f"{word:>9}" for word in ("device", "link", "server"))
    say(f"{'Mbit/s':>6}{stages}{'1/slowest':>12}{'tasks/s':>10}{'':9}{'sum':>8}{'lone task':>12}")
    for rate, floats, on_device, on_server in CASES:
        one_case(rate, floats, on_device, on_server, count)


def one_case(rate: float, floats: int, on_device: float, on_server: float, count: int) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = exported(Path(name) / "net", FloatCodec((floats,)), Few())
        # One sample a batch: what shares a batch would share the seconds that the server takes.
        _, port = stack.enter_context(process(serve_grpc, folder, on_server, 1))
        # A lone task gets what a link lets through at once for nothing, so that is little.
        burst = max(4096, int(rate * 160))
        _, far = stack.enter_context(process(link, port, rate, DELAY, burst))
        bundle = load_bundle(folder, placement="device")
        slowed(bundle, "head", on_device)
        given = torch.rand(1, floats)
        device = stack.enter_context(Device(bundle, f"127.0.0.1:{far}", retries=RETRIES, in_flight=6))
        for _ in range(5):  # and TCP finds out how fast it may go
            device.run(given)
        lone, stages = [], []
        for _ in range(15):
            start = time.monotonic()
            stages.append(device.run(given).seconds)
            lone.append(time.monotonic() - start)
        start = time.monotonic()
        # The first ones fill the line, so they do not count.
        ends = [time.monotonic() for _ in device.stream(itertools.repeat(given, count + 6))]
        seconds = (ends[-1] - ends[5]) if len(ends) > 6 else ends[-1] - start
        message = Side(bundle, "device").run(given, request=0).messages["server"]
        request = len(device.remotes["server"]._request(message))
    # What packing and unpacking take is a part of the stages, so these two are as they were measured.
    on_device = quantile([each["device"] + each["encode"] for each in stages], 0.5)
    on_server, on_link = quantile([each["server"] for each in stages], 0.5), request / (rate * 125_000)
    slowest, whole = max(on_device, on_link, on_server), on_device + on_link + on_server + 2 * DELAY
    reached, found = count / seconds * slowest, quantile(lone, 0.5)
    say(
        f"{rate:6g}{1000 * on_device:9.1f}{1000 * on_link:9.1f}{1000 * on_server:9.1f}{1 / slowest:12.2f}"
        f"{count / seconds:10.2f}{reached:9.1%}{1000 * whole:8.1f}{1000 * found:12.1f} ({found / whole - 1:+.1%})"
    )


def batching(seconds: float, clients: int = 8, rounds: int = 3) -> None:
    """Print the requests a second of some clients behind one link, with batches across requests and without.

    The two take turns, so that both meet the machine in the same states; the gains of all rounds say how sure one is.
    """
    say(f"\n{clients} clients behind one link of 100 Mbit/s, requests a second: the middle of {rounds} rounds")
    say(f"{'':42}{'one by one':>12}{'batches':>10}{'gain':>8}   least and most")
    for words, kind in (
        ("1 KB, a partition that does next to nothing", "few"),
        ("25 KB, layer 4 of a ResNet-18", "tail"),
    ):
        found = [[asked(kind, samples, clients, seconds) for samples in (1, 8)] for _ in range(rounds)]
        alone, together = (statistics.median(each) for each in zip(*found, strict=True))
        gains = [many / one for one, many in found]
        spread = f"{min(gains):.2f} to {max(gains):.2f}"
        say(f"{words:42}{alone:12.1f}{together:10.1f}{statistics.median(gains):8.2f}   {spread}")


def asked(kind: str, samples: int, clients: int, seconds: float) -> float:
    """Return how many requests a second are answered."""
    shape = (2048,) if kind == "few" else (256, 14, 14)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        codec = UniformCodec(shape, 4, 0.0, 1.0)
        folder = exported(Path(name) / "net", codec, Few() if kind == "few" else Codes())
        _, port = stack.enter_context(process(serve_grpc, folder, 0.0, samples))
        _, far = stack.enter_context(process(link, port, 100.0, 0.001, 64 * 1024))
        bundle = load_bundle(folder, placement="device")
        message = Side(bundle, "device").run(torch.rand(1, *shape), request=0).messages["server"]
        devices = [stack.enter_context(Device(bundle, f"127.0.0.1:{far}", retries=RETRIES)) for _ in range(clients)]
        counts, end = [0] * clients, time.monotonic() + seconds + 1.0
        begun = time.monotonic() + 1.0

        def ask(index: int) -> None:
            while (now := time.monotonic()) < end:
                devices[index].remotes["server"].run(message, Sent())
                counts[index] += now >= begun

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(counts) / seconds


class Codes(torch.nn.Module):
    """Layer 4 of a ResNet-18 on codes."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = real_tail(4)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.tail(codes.float() / 15)
