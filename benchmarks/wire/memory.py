"""Whether memory stays flat under faults, and how much the device side takes over its bare partition."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import torch

from cleave.deployment import Pipeline, load_bundle
from cleave.deployment.runtime.wire.protocol import METHODS, message
from cleave.deployment.runtime.wire.tensors import add_input

from .bundles import make_bundle, process, resident, say, serve_grpc

MAY = {"OK", "DEADLINE_EXCEEDED", "NOT_FOUND", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "CANCELLED", "UNAVAILABLE"}
# Requests as fast as they go, and seconds behind them, after which what grows once has grown: compiled code, and the
# memory that each thread of a server keeps for itself.
RUSH, WARM_UP = 30_000, 30.0


class Storm:
    """Requests of all kinds at a steady rate: right, late, damaged, cancelled, streamed, and of a bundle that is gone.

    Args:
        port: Of the server.
        model: The model.
        payload: A right payload of it.
        rate: Requests a second.
        reloads: Requests after each of which the bundle goes and comes back; 0: it stays.
    """

    def __init__(self, port: int, model: str, payload: bytes, rate: float, reloads: int = 500) -> None:
        self.port, self.model, self.rate, self.reloads = port, model, rate, reloads
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.right, self.wrong = (self._request(each) for each in (payload, payload[:-1]))
        self.counts: dict[str, int] = {}
        self.chance = random.Random(0)

    def _request(self, payload: bytes) -> Any:
        request = message("ModelInferRequest")(model_name=self.model)
        add_input(request, "payload", [payload])
        return request

    def _stub(self, method: str) -> Any:
        known = METHODS[method]
        kind = self.channel.stream_stream if known.streams else self.channel.unary_unary
        return kind(known.path, known.request.SerializeToString, known.response.FromString)

    def _count(self, code: str) -> None:
        if code not in MAY:
            raise RuntimeError(f"a request ended with {code}")
        self.counts[code] = self.counts.get(code, 0) + 1

    def one(self) -> None:
        """Ask once, in one of the ways."""
        way, infer = self.chance.randrange(10), self._stub("ModelInfer")
        try:
            if way < 6:
                infer(self.right, timeout=30)
            elif way < 8:
                infer(self.right, timeout=0.0005)
            elif way == 8:
                infer(self.wrong, timeout=30)
            else:
                call = infer.future(self.right, timeout=30)
                call.cancel()
                return self._count(call.code().name)
            self._count("OK")
        except grpc.RpcError as error:
            self._count(error.code().name)

    def rare(self, number: int) -> None:
        """Do what happens now and then: a stream that is left, a half-closed connection, a bundle that comes anew."""
        if number % 50 == 0:
            call = self._stub("ModelStreamInfer")(iter([self.right] * 8), timeout=30)
            next(call)
            call.cancel()
        if number % 50 == 25:
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0")
                connection.shutdown(socket.SHUT_WR)
        if self.reloads and number % self.reloads == self.reloads - 1:
            for method in ("RepositoryModelUnload", "RepositoryModelLoad"):
                request = METHODS[method].request(model_name=self.model.partition(".")[0])
                self._stub(method)(request, timeout=60)

    def run(self, rushed: threading.Event, stop: threading.Event) -> None:
        """Ask as fast as it goes at first, and then at the rate until told to stop."""
        for number in range(RUSH):
            self.one()
            self.rare(number)
        self.counts.clear()
        rushed.set()
        number, start = 0, time.monotonic()
        while not stop.wait(max(0.0, start + number / self.rate - time.monotonic())):
            self.one()
            self.rare(number)
            number += 1


def flat(minutes: float, rate: float, reloads: int) -> None:
    """Print the slope of the server's memory over some minutes of requests and faults, with its error."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = make_bundle(Path(name) / "packed", "packed")
        payload = Pipeline(load_bundle(folder)).run(torch.rand(1, 2048)).payloads["cut"][0]
        with process(serve_grpc, folder) as (server, port):
            storm = Storm(port, "packed.tail", payload, rate, reloads)
            rushed, stop = threading.Event(), threading.Event()
            thread, begun = threading.Thread(target=storm.run, args=(rushed, stop)), resident(server.pid or 0)
            thread.start()
            while thread.is_alive() and not rushed.wait(1.0):
                continue
            grown = resident(server.pid or 0) - begun
            start, found = time.monotonic(), []
            while (now := time.monotonic() - start) < WARM_UP + 60 * minutes and thread.is_alive():
                if now >= WARM_UP:
                    found.append((now / 60, resident(server.pid or 0), resident(os.getpid())))
                time.sleep(1.0)
            stop.set()
            thread.join()
    anew = f"loaded anew every {reloads} requests" if reloads else "stays loaded"
    say(f"\nMemory over {minutes:g} minutes of {rate:g} requests a second, the bundle {anew}")
    say(f"behind {RUSH:,} as fast as they went, in which the server's rose from {begun:.1f} MiB by {grown:.1f}")
    say(f"{'requests':8} {', '.join(f'{count:,} {code}' for code, count in sorted(storm.counts.items()))}")
    for who, column in (("server", 1), ("client", 2)):
        points = [(each[0], each[column]) for each in found]
        steep, error = slope(points)
        a_minute = f"{1024 * steep:+7.1f} ± {1024 * error:.1f} KiB a minute"
        say(f"{who:8} {points[-1][1]:8.1f} MiB at the end, {a_minute}")


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope of a line through points, by least squares, and its standard error.

    Memory goes in steps, so what is left of neighbours is alike; the error counts only as many points as are apart by
    the first order of that likeness.
    """
    count = len(points)
    x, y = (sum(each[i] for each in points) / count for i in (0, 1))
    spread = sum((a - x) ** 2 for a, _ in points)
    steep = sum((a - x) * (b - y) for a, b in points) / spread
    left = [b - y - steep * (a - x) for a, b in points]
    squares = sum(each**2 for each in left)
    alike = sum(a * b for a, b in itertools.pairwise(left)) / squares if squares else 0.0
    alike = min(max(alike, 0.0), 0.99)
    return steep, math.sqrt(squares / (count - 2) / spread * (1 + alike) / (1 - alike))


BARE = """
import json, sys, torch
torch.set_num_threads(1)
partition = torch.jit.load(sys.argv[1])
with torch.inference_mode():
    for _ in range(20):
        partition(torch.rand(1, *json.loads(sys.argv[2])))
"""
DEVICE = """
import sys, torch
torch.set_num_threads(1)
from cleave.deployment import Device, load_bundle
bundle = load_bundle(sys.argv[1], placement="device")
with Device(bundle, sys.argv[2]) as device:
    for _ in range(20):
        device.run(torch.rand(1, *bundle.input.shape))
"""
TELLS = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS:")))
"""


def device() -> None:
    """Print the memory of a device that asks a server, over that of its bare partition."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_bundle(Path(name) / "floats", "floats")
        shape = json.dumps(load_bundle(folder).input.shape)
        with process(serve_grpc, folder) as (_, port):
            ways = {
                "bare partition": (BARE, str(folder / "head.pt"), shape),
                "device client": (DEVICE, str(folder), f"127.0.0.1:{port}"),
            }
            found = {}
            for way, (code, *arguments) in ways.items():
                command = [sys.executable, "-c", code + TELLS, *arguments]
                told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
                found[way] = int(told.stdout.split()[-1]) / 1024
    say("\nResident memory of the device side after 20 requests of 0.8 MB")
    for way, size in found.items():
        say(f"{way:16} {size:8.1f} MiB")
    over = found["device client"] - found["bare partition"]
    say(f"{'over it':16} {over:8.1f} MiB")
