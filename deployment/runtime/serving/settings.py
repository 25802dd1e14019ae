"""A server's settings, checked before any bundle is loaded for it."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Any

from ...checks import is_whole
from ..trust import Trust
from .batching import check_batching

MOST_MESSAGE_BYTES = 2**31 - 1


def check_server(
    host: str,
    port: int,
    trust: Trust,
    wait: float,
    queue: int,
    workers: int,
    streams: int,
    samples: int,
    message_bytes: int | None,
    metrics_port: int | None,
    metrics_host: str,
) -> None:
    """Raise what :class:`~cleave.deployment.Server` would raise of its settings.

    Raises:
        ValueError: A setting is out of range, the token cannot be used, or others could listen.
        OSError: A port is in use, or a host is not this machine's.
    """
    for name, value in (("host", host), ("metrics_host", metrics_host)):
        check_host(name, value)
    trust.check_host(host)
    trust.secret()
    for name, number, least in (("port", port, 0), ("metrics_port", metrics_port or 0, 0)):
        if not is_whole(number) or not least <= number <= 65535:
            raise ValueError(f"{name} must be a whole number, {least} to 65535, got {number!r}")
    if not is_whole(streams) or streams < 1:
        raise ValueError(f"streams must be a whole number of at least 1, got {streams!r}")
    check_batching(samples, wait, queue, workers)
    if message_bytes is not None and (not is_whole(message_bytes) or not 1 <= message_bytes <= MOST_MESSAGE_BYTES):
        raise ValueError(
            f"message_bytes must be a whole number from 1 to {MOST_MESSAGE_BYTES}, or null, got {message_bytes!r}"
        )
    if port and port == metrics_port:
        raise ValueError(f"port={port} and metrics_port={metrics_port} are one port; take another for the metrics")
    check_free("port", host, port)
    if metrics_port is not None:
        check_free("metrics_port", metrics_host, metrics_port)


def check_host(name: str, host: Any) -> None:
    """Raise :class:`ValueError` where something is no host to listen on."""
    text = host.strip("[]") if isinstance(host, str) else ""
    # Of what has a colon, IPv6 addresses alone are hosts.
    if not text or any(each.isspace() or each == "/" for each in text) or text.count(":") == 1:
        raise ValueError(f"{name} must be a host's name or address without its port, such as 127.0.0.1, got {host!r}")


def check_free(name: str, host: str, port: int) -> None:
    """Raise :class:`OSError` where nobody can listen on a port of a host; ``name`` is what the port is called."""
    bare = host.strip("[]")
    where = f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
    try:
        found = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"cannot listen on {where}: nobody here knows {bare}; give an address of this machine") from error
    family, kind, protocol, _, address = found[0]
    with contextlib.closing(socket.socket(family, kind, protocol)) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(address)
            tried.listen()
        except OSError as error:
            reasons = {
                errno.EADDRINUSE: f"the port is in use; choose another {name}",
                errno.EADDRNOTAVAIL: f"{bare} is not this machine's; give one of its own addresses",
            }
            raise OSError(f"cannot listen on {where}: {reasons.get(error.errno or 0, error.strerror)}") from error
