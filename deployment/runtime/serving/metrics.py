"""What a server counts, and the port where Prometheus reads it."""

from __future__ import annotations

import bisect
import collections
import http.server
import socket
import threading
from collections.abc import Callable, Mapping, Sequence

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Labels = tuple[tuple[str, str], ...]


class _Histogram:
    """How often a value was at most each of some bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts = bounds, [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: _Labels) -> list[str]:
        found, seen = [], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            seen += count
            found.append(f"{name}_bucket{_spelled((*labels, ('le', bound)))} {seen}")
        return [*found, f"{name}_sum{_spelled(labels)} {self.total}", f"{name}_count{_spelled(labels)} {seen}"]


class Metrics:
    """Counts of a server, by status, by size of batch and by stage; for several threads.

    Example:
        >>> metrics = Metrics()
        >>> metrics.request("digits.tail", "OK", {"wait": 0.001, "compute": 0.02})
        >>> metrics.counts()
        {'OK': 1}
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str], int] = {}
        self._seconds = collections.defaultdict[tuple[str, str], _Histogram](lambda: _Histogram(_SECONDS))
        self._batches = collections.defaultdict[str, _Histogram](lambda: _Histogram(_SIZES))
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}

    def request(self, model: str, status: str, seconds: Mapping[str, float]) -> None:
        """Count a request that has ended, with the seconds of its stages."""
        with self._lock:
            self._requests[model, status] = self._requests.get((model, status), 0) + 1
            for stage, spent in seconds.items():
                self._seconds[model, stage].add(spent)

    def batch(self, model: str, samples: int) -> None:
        """Count a batch that was computed."""
        with self._lock:
            self._batches[model].add(samples)

    def counts(self) -> dict[str, int]:
        """Return how many requests ended with each status."""
        found: dict[str, int] = {}
        with self._lock:
            for (_, status), count in self._requests.items():
                found[status] = found.get(status, 0) + count
        return found

    def text(self) -> str:
        """Return all of it as Prometheus reads it."""
        lines = ["# HELP cleave_requests_total Requests that have ended.", "# TYPE cleave_requests_total counter"]
        with self._lock:
            for (model, status), count in self._requests.items():
                lines.append(f"cleave_requests_total{_spelled((('model', model), ('status', status)))} {count}")
            lines += [
                "# HELP cleave_stage_seconds Seconds of a request by stage.",
                "# TYPE cleave_stage_seconds histogram",
            ]
            for (model, stage), histogram in self._seconds.items():
                lines += histogram.lines("cleave_stage_seconds", (("model", model), ("stage", stage)))
            lines += ["# HELP cleave_batch_samples Samples of a batch.", "# TYPE cleave_batch_samples histogram"]
            for model, histogram in self._batches.items():
                lines += histogram.lines("cleave_batch_samples", (("model", model),))
        for name, (words, value) in self.gauges.items():
            lines += [f"# HELP {name} {words}", f"# TYPE {name} gauge", f"{name} {value()}"]
        return "\n".join(lines) + "\n"


def _spelled(labels: _Labels) -> str:
    escaped = {name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels}
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


class _OverIPv6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


def _family(host: str) -> type[http.server.ThreadingHTTPServer]:
    return _OverIPv6 if ":" in host else http.server.ThreadingHTTPServer


class MetricsServer:
    """Answers ``GET /metrics`` on a port of its own.

    Args:
        metrics: What is told.
        host: Where it listens.
        port: The port; 0: any that is free.

    Attributes:
        port: The port.

    Raises:
        OSError: The port is in use.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                content = metrics.text().encode() if self.path == "/metrics" else b"this port has /metrics alone\n"
                self.send_response(200 if self.path == "/metrics" else 404)
                self.send_header("Content-Type", _TYPE)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                return

        self._server = _family(host)((host.strip("[]"), port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
