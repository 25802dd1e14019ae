"""Serve bundles over the Open Inference Protocol."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("serve")

import os
import time
from collections.abc import Callable
from importlib import metadata

import torch
from omegaconf import DictConfig, ListConfig

from cleave.deployment import Onward, Repository, Retries, Server, Trust
from cleave.deployment.runtime.serving.batching import checked_threads
from cleave.lightning_modules import signals
from cleave.reports.terminal import say


def serve(cfg: DictConfig, asked: Callable[[], bool] | None = None) -> bool:
    """Serve what the config describes until a signal, or ``asked``, says to stop; return whether all was answered."""
    server = built(cfg)
    with signals.deferring(lambda signum: say(f"{signals.name_of(signum)}: answering what was accepted")):
        server.start()
        served = [f"{model.name} (version {model.version})" for model in server.repository.served]
        say(f"Serving {', '.join(served) or 'nothing yet'} on {cfg.listen} port {server.port}")
        if server.metrics_port is not None:
            say(f"Metrics: http://{cfg.listen}:{server.metrics_port}/metrics")
        server.wait(asked or (lambda: signals.received() is not None))
        start = time.monotonic()
        answered = server.drain(cfg.grace)
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(server.metrics.counts().items()))
    say(f"Stopped after {time.monotonic() - start:.1f} seconds. Requests: {counts or 'none'}")
    return answered


def built(cfg: DictConfig) -> Server:
    """Return the server that a config describes, its bundles loaded.

    Raises:
        ValueError: A setting is out of range, or a bundle cannot be served.
        OSError: The port is in use.
    """
    bundles = list(cfg.bundle) if isinstance(cfg.bundle, ListConfig) else [] if cfg.bundle is None else [cfg.bundle]
    if not bundles and cfg.repository is None:
        raise ValueError("bundle=null without a repository serves nothing, and loads nothing; name a bundle's folder")
    if not isinstance(cfg.grace, int | float) or isinstance(cfg.grace, bool) or cfg.grace <= 0:
        raise ValueError(f"grace must be a positive number of seconds, got {cfg.grace}")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={cfg.device}: torch finds no CUDA device here; use device=cpu")
    trust = Trust(cfg.certificate, cfg.key, cfg.authorities, cfg.token, cfg.insecure)
    trust.check_host(cfg.listen)
    use_threads(cfg)
    repository = Repository(cfg.placement, cfg.repository, cfg.device, cfg.batch.samples)
    for bundle in bundles:
        repository.add(bundle)
    wait = cfg.batch.wait_ms
    if not isinstance(wait, int | float) or isinstance(wait, bool) or not 0 <= wait <= 60_000:
        raise ValueError(f"batch.wait_ms must be 0 to 60000 milliseconds, got {wait}")
    return Server(
        repository,
        host=cfg.listen,
        port=cfg.port,
        trust=trust,
        wait=wait / 1000,
        queue=cfg.queue,
        workers=cfg.workers,
        streams=cfg.streams,
        message_bytes=cfg.message_bytes,
        metrics_port=cfg.metrics_port,
        version=version(),
        onward=onward(cfg),
    )


def onward(cfg: DictConfig) -> Onward | None:
    """Return how samples go on to other placements, where the config names their servers."""
    given = cfg.onward
    if not given.servers:
        keys = ("certificate", "key", "authorities", "token")
        if changed := [f"onward.{key}={given[key]}" for key in keys if given[key] is not None]:
            raise ValueError(f"{', '.join(changed)} would be ignored: onward.servers names none")
        return None
    trust = Trust(given.certificate, given.key, given.authorities, given.token)
    retries = Retries(timeout=given.timeout, attempts=given.attempts)
    return Onward({str(place): str(address) for place, address in given.servers.items()}, trust, retries)


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
