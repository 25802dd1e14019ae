"""What serving costs, by our server: the wire, streams over slow links, and memory.

    python benchmarks/serving.py wire [--requests 500] [--peers PYTHON] [--tail]
    python benchmarks/serving.py streams [--tasks 60]
    python benchmarks/serving.py memory [--minutes 10] [--rate 20] [--reloads 500]
    python benchmarks/serving.py device

``wire`` times one request to our server against raw TCP and against no wire at all, and against KServe where PYTHON is
that of an environment of benchmarks/serving-peers.txt. The partition does next to nothing, so that what is measured is
the way there; ``--tail`` adds most of a ResNet-18. ``streams`` sends tasks over emulated links. ``memory`` says whether
a server grows under faults, ``device`` what the client takes over its bare partition.
"""

from __future__ import annotations

import argparse

import torch
from wire import costs, memory, streams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["wire", "streams", "memory", "device"])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--peers", help="the Python of an environment with KServe")
    parser.add_argument("--tail", action="store_true", help="also with a real tail")
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument(
        "--reloads", type=int, default=500, help="requests until the bundle is loaded anew; 0: it stays"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "wire":
        for kind in ("floats", "packed", *(("tail",) if options.tail else ())):
            costs.measure(kind, options.requests, options.warm_up, options.peers)
    elif options.what == "streams":
        streams.tasks(options.tasks)
        streams.batching(seconds=5.0)
    elif options.what == "memory":
        memory.flat(options.minutes, options.rate, options.reloads)
    elif options.what == "device":
        memory.device()


if __name__ == "__main__":
    main()
