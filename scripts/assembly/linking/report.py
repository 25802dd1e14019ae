"""What a path came to: its work on both sides, and the bytes up and down."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from cleave.architectures import StagedNetwork, path_costs
from cleave.architectures.linking.described import NOT_USED, is_linked
from cleave.reports.terminal import say, table
from cleave.scripts.assembly.networks import plain_value


def path_words(cfg: DictConfig) -> tuple[str, ...]:
    """Return what tells a path from others, for the label of a point; nothing where there is none."""
    if not is_linked(cfg):
        return ()
    links = cfg.links
    blocks = ", ".join("-" if block is None else str(block) for block in plain_value(links.path))
    words = [f"path [{blocks}]", f"{links.get('style', 'own')} links"]
    words += ["random host"] if cfg.host.get("weights") == "random" else []
    return (*words, *(["just links"] if links.host == NOT_USED else []))


def path_record(network: StagedNetwork, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return MACs and parameters kept, skipped and added, and the bytes that cross; ``None`` where there are no links.

    Args:
        network: The network.
        metrics: What was measured of it in testing, by name.
    """
    costs = path_costs(network)
    if costs is None:
        return None
    record: dict[str, Any] = {name: dict(work) for name, work in dataclasses.asdict(costs).items()}
    for name, owner in (("bytes_up", network.stages.owners[0]), ("bytes_down", "host")):
        sent = [_bytes(network, cut, metrics) for cut in network.bottlenecks if cut.partition("/")[0] == owner]
        record[name] = None if None in sent else sum(value for value in sent if value is not None)
    return record


def _bytes(network: StagedNetwork, cut: str, metrics: Mapping[str, Any]) -> float | None:
    name = "test/payload_bytes" + (f"/{cut}" if len(network.bottlenecks) > 1 else "")
    return float(metrics[name]) if name in metrics else None


def path_table(record: Mapping[str, Any] | None) -> None:
    """Print what a path saves the local network and adds, per image."""
    if record is None:
        return
    names = {"kept": "local, kept", "skipped": "local, skipped", "host": "host", "links": "links", "inserts": "others"}
    rows = [(words, f"{record[name]['macs']:,}", f"{record[name]['params']:,}") for name, words in names.items()]
    table("The path, per image", rows, ("part", "MACs", "parameters"))
    if record["bytes_up"] is not None and record["bytes_up"] + record["bytes_down"]:
        say(f"bytes up {record['bytes_up']:,.0f}, down {record['bytes_down']:,.0f}")
