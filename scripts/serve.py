"""Serve bundles over the Open Inference Protocol."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("serve")

import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from cleave.deployment import Onward, Repository, Server
from cleave.deployment.checks import is_finite
from cleave.deployment.runtime.serving.batching import checked_threads
from cleave.deployment.runtime.serving.settings import check_server
from cleave.lightning_modules import signals
from cleave.reports.terminal import say
from cleave.scripts.assembly.given.texts import changed_settings, check_texts, in_group, naming, spelled
from cleave.scripts.assembly.inferring.trusting import retries_of, trust_of
from cleave.scripts.assembly.starting import outlets

EXAMPLE = 'onward.servers={cloud: "HOST:8001"}'
METRICS_LISTEN = "127.0.0.1"


# What the config calls the arguments of a server.
NAMES = {"host": "listen", "metrics_host": "metrics_listen", "samples": "batch.samples", "servers": "onward.servers"}


def serve(cfg: DictConfig, asked: Callable[[], bool] | None = None) -> bool:
    """Serve what the config describes until a signal, or ``asked``, says to stop; return whether all was answered."""
    server = built(cfg)
    with signals.deferring(lambda signum: tell(f"{signals.name_of(signum)}: answering what was accepted")):
        server.start()
        served = [f"{model.name} (version {model.version})" for model in server.repository.served]
        tell(f"Serving {', '.join(served) or 'nothing yet'} on {cfg.listen} port {server.port}")
        if server.metrics_port is not None:
            tell(f"Metrics: http://{in_address(cfg.metrics_listen)}:{server.metrics_port}/metrics")
        server.wait(asked or (lambda: signals.received() is not None))
        start = time.monotonic()
        answered = server.drain(cfg.grace)
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(server.metrics.counts().items()))
    tell(f"Stopped after {time.monotonic() - start:.1f} seconds. Requests: {counts or 'none'}")
    return answered


def tell(words: str) -> None:
    """Say it to whoever listens; a server whose output nobody reads, or no disk holds, goes on serving."""
    with outlets.unread():
        say(words)


def in_address(host: str) -> str:
    """Return a host as an address has it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def built(cfg: DictConfig) -> Server:
    """Return the server that a config describes, its bundles loaded once all settings are known to be right.

    Raises:
        ValueError: A setting is out of range, or a bundle cannot be served.
        OSError: The port is in use.
    """
    bundles = checked_bundles(cfg)
    wait, trust = checked_numbers(cfg), trust_of(cfg)
    settings: dict[str, Any] = {
        "port": cfg.port,
        "trust": trust,
        "wait": wait,
        "queue": cfg.queue,
        "workers": cfg.workers,
        "streams": cfg.streams,
        "message_bytes": cfg.message_bytes,
        "metrics_port": cfg.metrics_port,
        "metrics_host": cfg.metrics_listen,
    }
    with naming(NAMES):
        check_server(cfg.listen, samples=cfg.batch.samples, **settings)
    behind = onward(cfg)
    use_threads(cfg)
    with naming(NAMES):
        repository = Repository(cfg.placement, cfg.repository, cfg.device, cfg.batch.samples)
        for bundle in bundles:
            repository.add(bundle)
        return Server(repository, cfg.listen, **settings, version=version(), onward=behind)


def checked_bundles(cfg: DictConfig) -> list[str]:
    """Return the folders of the bundles to begin with; ValueError where there is nothing to serve."""
    given = list(cfg.bundle) if isinstance(cfg.bundle, ListConfig) else [] if cfg.bundle is None else [cfg.bundle]
    if not all(isinstance(bundle, str) and bundle for bundle in given):
        raise ValueError(f"bundle must be a bundle's folder, or a list of them, got {spelled(cfg.bundle)}")
    check_texts(cfg, {"repository": "a folder of bundles", "placement": "a placement's name"})
    if not given and cfg.repository is None:
        raise ValueError(
            f"bundle={spelled(cfg.bundle)} without a repository serves nothing, and loads nothing; name a bundle's "
            "folder"
        )
    return given


def checked_numbers(cfg: DictConfig) -> float:
    """Return for how many seconds a request waits for others, with what else no part of a server checks.

    Raises:
        ValueError: A setting is out of range, or would be ignored.
    """
    check_texts(
        cfg,
        {"listen": "a host's name or address", "metrics_listen": "a host's name or address", "device": "cpu or cuda"},
        null=False,
    )
    if cfg.metrics_port is None and cfg.metrics_listen != METRICS_LISTEN:
        raise ValueError(f"metrics_listen={cfg.metrics_listen} would be ignored: metrics_port=null tells no metrics")
    if not is_finite(cfg.grace) or cfg.grace <= 0:
        raise ValueError(f"grace must be a positive number of seconds, got {cfg.grace}")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={cfg.device}: torch finds no CUDA device here; use device=cpu")
    wait = cfg.batch.wait_ms
    if not is_finite(wait) or not 0 <= wait <= 60_000:
        raise ValueError(f"batch.wait_ms must be 0 to 60000 milliseconds, got {wait}")
    return wait / 1000


def onward(cfg: DictConfig) -> Onward | None:
    """Return how samples go on to other placements, where the config names their servers."""
    servers = cfg.onward.servers
    if servers is not None and not isinstance(servers, DictConfig):
        raise ValueError(f"onward.servers must name placements, '{EXAMPLE}', got {spelled(servers)}")
    if not servers:
        if changed := changed_settings(cfg, "onward", but="servers"):
            raise ValueError(f"{', '.join(changed)} would be ignored: onward.servers names none")
        return None
    addresses: dict[str, Any] = {str(place): address for place, address in servers.items()}
    for place, address in addresses.items():
        if not isinstance(address, str):
            raise ValueError(f"onward.servers.{place} must be HOST:PORT, got {spelled(address)}; '{EXAMPLE}'")
    trust, retries = trust_of(cfg, "onward"), retries_of(cfg, "onward")
    with naming(in_group(cfg, "onward")):
        return Onward(addresses, trust, retries)


def version() -> str:
    """Return Cleave's version, where it is installed."""
    try:
        return metadata.version("cleave")
    except metadata.PackageNotFoundError:
        return ""


def use_threads(cfg: DictConfig) -> None:
    """Give torch the threads that a config names, or a fair share of the cores; ValueError where that is too many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    checked_threads(cfg.workers, 1 if cfg.threads is None else cfg.threads, cores)
    torch.set_num_threads(cores // cfg.workers if cfg.threads is None else cfg.threads)


def main(cfg: DictConfig) -> None:
    """Serve until a signal comes."""
    if not serve(cfg):
        raise SystemExit(1)
