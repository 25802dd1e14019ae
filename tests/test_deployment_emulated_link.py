"""The emulated link: its rate by an injected clock, bytes in order, lost connections, and a device behind it."""

from __future__ import annotations

import socket
import threading

import pytest
import torch

from cleave.deployment import Breaker, Device, Pipeline, Retries, load_bundle
from cleave.deployment.runtime.emulated_link import EmulatedLink, LinkSettings, TokenBucket, Trace, megabits

from .deployment_networks import images, make_bundle
from .serving_client import PATIENT, serving


class Clock:
    """A time that passes in sleep alone."""

    def __init__(self):
        self.now, self._lock = 100.0, threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        with self._lock:
            self.now += seconds


@pytest.fixture
def echo():
    """A server that sends back what comes, and ends when its client does."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection:
            try:
                while content := connection.recv(65536):
                    connection.sendall(content)
            except OSError:
                return

    def accept():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


def through(port, content):
    """Send bytes, say that no more come, and return what comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        sender = threading.Thread(target=lambda: (connection.sendall(content), connection.shutdown(socket.SHUT_WR)))
        sender.start()
        found = bytearray()
        while part := connection.recv(65536):
            found += part
        sender.join()
    return bytes(found)


def test_a_bucket_lets_through_its_rate_and_a_burst():
    clock = Clock()
    bucket = TokenBucket(Trace([(0, 1000.0)]), burst=500, clock=clock)
    waits = []
    for _ in range(20):
        waits.append(bucket.wait(250))
        clock.sleep(waits[-1])
    assert waits[:2] == [0, 0]
    assert waits[2:] == pytest.approx([0.25] * 18)
    clock.sleep(60)
    assert [bucket.wait(250) for _ in range(3)] == pytest.approx([0, 0, 0.25])  # no more than a burst is saved


def test_bytes_come_in_order_at_the_links_rate_in_both_directions(echo):
    clock, content = Clock(), bytes(range(256)) * 1024
    settings = LinkSettings(Trace([(0, 100_000.0)]), burst=4096)
    with EmulatedLink(echo, settings, clock, clock.sleep) as link:
        assert through(link.port, content) == content
    # Each direction takes so long; they overlap as threads will have it, so together at most twice that.
    one_way = (len(content) - 4096) / 100_000
    assert one_way * 0.999 <= clock.now - 100 <= 2 * one_way * 1.001


def test_delay_and_jitter_leave_the_bytes_in_order(echo):
    content = bytes(range(256)) * 256
    settings = LinkSettings(megabits(1000), delay=0.002, jitter=0.003, chance=3)
    with EmulatedLink(echo, settings) as link:
        assert through(link.port, content) == content


def test_connections_are_lost_by_chance_or_cut(echo):
    with EmulatedLink(echo, LinkSettings(megabits(1000), loss=1.0)) as link:
        assert through_or_lost(link.port) == b""
        assert link.lost >= 1
    with EmulatedLink(echo, LinkSettings(megabits(1000))) as link:
        with socket.create_connection(("127.0.0.1", link.port), timeout=30) as connection:
            connection.sendall(b"here")
            assert connection.recv(4) == b"here"
            link.cut()
            assert received(connection) == b""
        assert through(link.port, b"again") == b"again"


def received(connection):
    try:
        return connection.recv(4)
    except ConnectionError:
        return b""


def through_or_lost(port):
    try:
        return through(port, b"x" * 10)
    except OSError:
        return b""


def test_a_device_answers_over_a_slow_link_as_over_none(tmp_path):
    bundle = make_bundle(tmp_path / "net", "sample")
    expected = Pipeline(bundle).run(images(3))
    with serving(tmp_path / "net") as (server, _):
        settings = LinkSettings(megabits(20), delay=0.005, jitter=0.002)
        with (
            EmulatedLink(server.port, settings) as link,
            Device(
                load_bundle(tmp_path / "net", placement="device"), f"127.0.0.1:{link.port}", retries=PATIENT
            ) as device,
        ):
            answered = device.run(images(3))
            assert torch.equal(answered.result.logits, expected.logits)
            assert device.link.round_trip >= 0.01  # no sooner than light: what was emulated is felt


def test_cut_connections_lose_no_request(tmp_path):
    bundle = make_bundle(tmp_path / "net", "sample")
    pipeline = Pipeline(bundle)
    with serving(tmp_path / "net") as (server, _), EmulatedLink(server.port, LinkSettings(megabits(200))) as link:
        retries = Retries(timeout=60.0, attempts=1000, pause=0.01, longest=0.05)
        address = f"127.0.0.1:{link.port}"
        with Device(bundle, address, retries=retries, breaker=lambda: Breaker(failures=10_000)) as device:
            done = 0
            for number, answered in enumerate(device.stream(images(2, seed=n) for n in range(60))):
                if number % 15 == 5:
                    link.cut()
                expected = pipeline.run(images(2, seed=number))
                torch.testing.assert_close(answered.result.logits, expected.logits)
                done += 1
    assert done == 60


def test_traces_are_read_from_csv(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("seconds,bytes_per_second\n0,1000\n1.5,250.5\n")
    trace = Trace.read(file, period=3.0)
    assert [trace.rate(at) for at in (0, 1.4, 1.5, 2.9, 3.0, 4.5)] == [1000, 1000, 250.5, 250.5, 1000, 250.5]
    for text in ("time,rate\n0,1\n", "seconds,bytes_per_second\n", "seconds,bytes_per_second\n0,0\n",
                 "seconds,bytes_per_second\n1,5\n", "seconds,bytes_per_second\n0,x\n"):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=r"trace.csv must have the columns seconds and bytes_per_second"):
            Trace.read(file)
    for settings in ({"delay": -1}, {"jitter": float("nan")}, {"loss": 2}, {"burst": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            LinkSettings(megabits(1), **settings)
    with pytest.raises(ValueError, match="the rate must be"):
        megabits(0)
    with pytest.raises(ValueError, match="period must be"):
        Trace([(0, 1), (2, 1)], period=1)
