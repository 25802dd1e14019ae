"""The emulated link against the kernel's own token bucket, between network namespaces. Needs root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from cleave.deployment.runtime.emulated_link import EmulatedLink, LinkSettings, megabits

RATE, BYTES = 20.0, 2_000_000
# The kernel counts 66 bytes of headers beside 1,448 of content.
HEADERS = 1514 / 1448
SENDER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60) as connection:
    connection.sendall(bytes(int(sys.argv[3])))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
"""


def run(command):
    subprocess.run(command.split(), check=True, capture_output=True, timeout=60)


@pytest.fixture
def namespace():
    """A namespace behind a link at the rate, and this end's address."""
    if not hasattr(os, "geteuid") or os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("a kernel's token bucket needs root, ip and tc")
    name, own = f"cleave{os.getpid()}", f"cl{os.getpid() % 100_000}"
    try:
        run(f"ip netns add {name}")
        run(f"ip link add {own} type veth peer name {own}b netns {name}")
        run(f"ip addr add 10.211.77.1/30 dev {own}")
        run(f"ip link set {own} up")
        run(f"ip -n {name} addr add 10.211.77.2/30 dev {own}b")
        run(f"ip -n {name} link set {own}b up")
        run(f"tc -n {name} qdisc add dev {own}b root tbf rate {RATE:g}mbit burst 16kb latency 200ms")
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)
        pytest.skip(f"no namespaces with a token bucket here: {error}")
    yield name, "10.211.77.1"
    run(f"ip netns del {name}")


def received(listening):
    """Seconds from the first byte to the last."""
    connection, _ = listening.accept()
    with connection:
        count = len(connection.recv(4096))
        start = time.monotonic()
        while part := connection.recv(65536):
            count += len(part)
        seconds = time.monotonic() - start
        assert count == BYTES
        connection.sendall(b"!")
    return seconds


def sent(command, listening):
    found = []
    thread = threading.Thread(target=lambda: found.append(received(listening)))
    thread.start()
    subprocess.run(command, check=True, timeout=120)
    thread.join()
    return found[0]


@pytest.mark.slow
def test_the_emulated_link_takes_as_long_as_the_kernels_token_bucket(namespace):
    name, address = namespace
    with socket.create_server((address, 0)) as listening:
        port = listening.getsockname()[1]
        python = [sys.executable, "-c", SENDER]
        by_kernel = sent(["ip", "netns", "exec", name, *python, address, str(port), str(BYTES)], listening) / HEADERS
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        EmulatedLink(listening.getsockname()[1], LinkSettings(megabits(RATE))) as link,
    ):
        emulated = sent([*python, "127.0.0.1", str(link.port), str(BYTES)], listening)
    wanted = BYTES / (RATE * 125_000)
    print(f"at {RATE:g} Mbit/s {wanted:.3f} s; kernel {by_kernel:.3f} s, emulated {emulated:.3f} s")
    assert by_kernel == pytest.approx(wanted, rel=0.1)
    assert emulated == pytest.approx(by_kernel, rel=0.15)
