"""The device client of a config: who is asked, how often, and what is done where nobody answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cleave.deployment import load_bundle, read_manifest
from cleave.reports.terminal import say

if TYPE_CHECKING:
    from cleave.deployment import Device

# What conf/infer.yaml says: other values mean something only to a server.
DEFAULTS: dict[str, Any] = {
    "name": None,
    "timeout": 5.0,
    "attempts": 4,
    "in_flight": 4,
    "fallback": "error",
    "local": None,
    "certificate": None,
    "key": None,
    "authorities": None,
    "token": None,
}


def check_unasked(cfg: DictConfig) -> None:
    """Raise :class:`ValueError` where settings of a server are given, and no server is."""
    changed = [f"remote.{key}={value}" for key, value in cfg.remote.items() if value != DEFAULTS[str(key)]]
    if changed:
        raise ValueError(f"{', '.join(changed)} would be ignored: server=HOST:PORT names no server")


def device_of(cfg: DictConfig) -> Device:
    """Return the device client that a config describes.

    Raises:
        ValueError: A setting is out of range, or does not fit the bundle.
    """
    from cleave.deployment import Device, Retries, Trust  # who asks nobody needs no gRPC

    if cfg.exits.policy_file is not None:
        raise ValueError(
            f"exits.policy_file={cfg.exits.policy_file} with a server: both sides need the same policy, so export the "
            "bundle with it"
        )
    if cfg.output is not None and Path(str(cfg.output)).suffix.lower() != ".jsonl":
        raise ValueError(f"output={cfg.output} must end in .jsonl with a server: a JSON object an image")
    remote = cfg.remote
    retries = Retries(timeout=remote.timeout, attempts=remote.attempts)
    trust = Trust(remote.certificate, remote.key, remote.authorities, remote.token)
    entry = read_manifest(Path(cfg.bundle)).route.entry
    return Device(
        load_bundle(cfg.bundle, device=cfg.device, placement=entry),
        str(cfg.server),
        name=remote.name,
        bits=cfg.bits,
        trust=trust,
        retries=retries,
        fallback=remote.fallback,
        local=None if remote.local is None else load_bundle(remote.local, device=cfg.device),
        in_flight=remote.in_flight,
    )


def write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    # A name that is not UTF-8 is written with its bytes escaped.
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def say_how_it_went(device: Device, lines: Sequence[Mapping[str, Any]]) -> None:
    """Print who was asked how often, who answered instead, and what is known of the link."""
    asked = [line for line in lines if line["attempts"]]
    again = sum(line["attempts"] > 1 for line in lines)
    say(f"{len(asked):,} of {len(lines):,} images went to the server, {again:,} of them more than once")
    if instead := sum(bool(line["flag"]) for line in lines):
        say(f"{instead:,} were answered here instead, by the fallback `{device.fallback}`")
    trip, rate = device.link.round_trip, device.link.bytes_per_second
    if trip is not None:
        more = "" if rate is None else f", {rate / 125_000:,.1f} Mbit/s"
        say(f"The link, by these requests: {1000 * trip:,.1f} ms there and back{more}")
