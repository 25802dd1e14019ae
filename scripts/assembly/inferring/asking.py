"""The device client of a config: who is asked, how often, and what is done where nobody answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cleave.deployment import load_bundle, read_manifest
from cleave.reports.terminal import say
from cleave.scripts.assembly.given.texts import changed_settings, in_group, naming
from cleave.scripts.assembly.inferring.trusting import retries_of, trust_of

if TYPE_CHECKING:
    from cleave.deployment import Device


class Asked:
    """How often a server was asked, counted from the lines of answers as they come."""

    def __init__(self) -> None:
        self.images = self.went = self.again = self.instead = 0

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Count the answers of a batch."""
        for line in lines:
            self.images += 1
            self.went += line["attempts"] > 0
            self.again += line["attempts"] > 1
            self.instead += bool(line["flag"])


def check_unasked(cfg: DictConfig) -> None:
    """Raise :class:`ValueError` where settings of a server are given, and no server is."""
    if changed := changed_settings(cfg, "remote"):
        raise ValueError(f"{', '.join(changed)} would be ignored: server=HOST:PORT names no server")


def check_remote(cfg: DictConfig) -> None:
    """Raise :class:`ValueError` where settings mean nothing to who asks a server."""
    if cfg.exits.policy_file is not None:
        raise ValueError(
            f"exits.policy_file={cfg.exits.policy_file} with a server: both sides need the same policy, so export the "
            "bundle with it"
        )
    if cfg.output is not None and Path(str(cfg.output)).suffix.lower() != ".jsonl":
        raise ValueError(f"output={cfg.output} must end in .jsonl with a server: a JSON object an image")
    if cfg.remote.name == "":
        raise ValueError("remote.name must be the bundle's name on the server, or null for its folder's, got nothing")


def device_of(cfg: DictConfig) -> Device:
    """Return the device client that a config describes.

    Raises:
        ValueError: A setting is out of range, or does not fit the bundle.
    """
    from cleave.deployment import Device  # who asks nobody needs no gRPC

    remote = cfg.remote
    trust, retries = trust_of(cfg, "remote"), retries_of(cfg, "remote")
    with naming(in_group(cfg, "remote")):
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


def say_how_it_went(device: Device, asked: Asked) -> None:
    """Print who was asked how often, who answered instead, and what is known of the link."""
    say(f"{asked.went:,} of {asked.images:,} images went to the server, {asked.again:,} of them more than once")
    if asked.instead:
        say(f"{asked.instead:,} were answered here instead, by the fallback `{device.fallback}`")
    trip, rate = device.link.round_trip, device.link.bytes_per_second
    if trip is not None:
        more = "" if rate is None else f", {rate / 125_000:,.1f} Mbit/s"
        say(f"The link, by these requests: {1000 * trip:,.1f} ms there and back{more}")
