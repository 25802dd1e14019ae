"""What each path asks of two networks before any training: seconds, bytes and parameters of its blocks and links."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from cleave.architectures import Blocks, Link, Path
from cleave.architectures.linking.link import HOST, LOCAL, make_link
from cleave.architectures.macs import count_params
from cleave.deployment import ENVELOPE_BYTES
from cleave.planning import (
    BlockTimes,
    PathLoad,
    crossings,
    measure_chain,
    path_loads,
    read_block_times,
    write_block_times,
)
from cleave.reports.terminal import say
from cleave.scripts.assembly.linking.pairs import Pair

TIMES = "times.json"
FLOAT_BYTES = 4


def build_links(pair: Pair, paths: Sequence[Path]) -> dict[str, Link]:
    """Build every link that the paths need, untrained, by its name; what fits no block is named before any training.

    Raises:
        ValueError: No link fits.
    """
    local, host = pair.local, pair.host
    found: dict[str, Link] = {}
    for path in paths:
        left, entered = local.behind(path.lout), local.before(path.lin)
        if host is None or path.hin is None or path.hout is None:
            ends = [(left, entered, LOCAL)]
        else:
            ends = [(left, host.before(path.hin), HOST), (host.behind(path.hout), entered, HOST)]
        for name, (source, target, owner) in zip(crossings(path, *pair.names), ends, strict=True):
            if name not in found:
                found[name] = make_link(pair.links, source, target, owner, name)
    return found


def block_times(settings: DictConfig, folder: FilePath, pair: Pair, links: Mapping[str, Link]) -> BlockTimes:
    """Return the times of a file, or those that a search's folder keeps, or those measured now.

    What was measured is kept: measured anew it would differ, and a search that goes on would choose other paths.

    Raises:
        ValueError: The file misses a block, or a time is negative.
    """
    if settings.times is not None:
        return read_block_times(settings.times, *pair.names)
    file, kept = folder / TIMES, None
    if file.exists():
        kept = read_block_times(file, *pair.names)
        say(f"Times: {file}; delete it to measure them anew")
    known = kept.links if kept is not None and isinstance(kept.links, Mapping) else {}
    missing = {name: link for name, link in links.items() if name not in known}
    if kept is not None and (not missing or not isinstance(kept.links, Mapping)):
        return kept
    blocks = kept or _measured_blocks(settings, pair)
    times = dataclasses.replace(blocks, links={**known, **_measured_links(settings, missing)})
    write_block_times(file, times)
    return times


def loads_of(
    pair: Pair,
    times: BlockTimes,
    links: Mapping[str, Link],
    paths: Sequence[Path],
    bytes_per_second: float | None = None,
) -> tuple[PathLoad, dict[Path, PathLoad]]:
    """Return what the local network alone, and each path, asks of both sides: seconds and parameters.

    Args:
        pair: The networks.
        times: Seconds of blocks and links.
        links: The links by name.
        paths: The paths.
        bytes_per_second: Speed of the wire, up and down; ``None``: its time counts for nothing.
    """
    local, host = pair.local, pair.host

    def params(blocks: Blocks, *runs: range) -> int:
        return sum(count_params(blocks.stages[number]) for run in runs for number in run)

    loads = {}
    for path, load in path_loads(times, paths).items():
        own = params(local, local.numbers(0, path.lout), local.numbers(path.lin))
        on_path = [links[name] for name in crossings(path, *pair.names)]
        linked = sum(map(count_params, on_path))
        if host is None or path.hin is None or path.hout is None:
            loads[path] = dataclasses.replace(load, local_params=own + linked)
            continue
        lent = params(host, host.numbers(path.hin, path.hout))
        wire = 0.0 if bytes_per_second is None else _crossing_bytes(*on_path) / bytes_per_second
        loads[path] = dataclasses.replace(load, communication_seconds=wire, local_params=own, host_params=lent + linked)
    return PathLoad(times.original, local_params=params(local, local.numbers(0))), loads


def _crossing_bytes(entry: Link, leaving: Link) -> int:
    """Return the bytes up and down as floats: both links are on the host, so what the first reads goes up."""
    return sum(FLOAT_BYTES * math.prod(each.shape) + ENVELOPE_BYTES for each in (entry.source, leaving.target))


def _measured_blocks(settings: DictConfig, pair: Pair) -> BlockTimes:
    def chain(blocks: Blocks, runs: Sequence[range]) -> list[float]:
        modules = [nn.Sequential(*(blocks.stages[number] for number in run)).to(settings.device) for run in runs]
        return measure_chain(modules, _images(settings, blocks.sample.shape[1:]), rounds=settings.rounds)

    def runs(blocks: Blocks) -> list[range]:
        return [blocks.numbers(block, block) for block in range(len(blocks.names))]

    *local, output = chain(pair.local, [*runs(pair.local), pair.local.numbers(len(pair.local.names))])
    host = [] if pair.host is None else chain(pair.host, runs(pair.host))
    names, lent = pair.names
    return BlockTimes(dict(zip(names, local, strict=True)), output, dict(zip(lent, host, strict=True)))


def _measured_links(settings: DictConfig, links: Mapping[str, Link]) -> dict[str, float]:
    seconds = {}
    for name, link in links.items():
        images = _images(settings, link.source.shape)
        (seconds[name],) = measure_chain([link.eval().to(settings.device)], images, rounds=settings.rounds)
    return seconds


def _images(settings: DictConfig, shape: Sequence[int]) -> Tensor:
    return torch.rand(settings.batch_size, *shape, device=settings.device)
