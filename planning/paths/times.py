"""Seconds per image of every block and link, measured or read from a file, and what they make of a path."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures.linking.path import Path, read_path
from cleave.architectures.naming import did_you_mean, whole_number
from cleave.deployment.bundle.canonical_json import parse

PARTS = ("local", "output", "host", "links")


@dataclass(frozen=True)
class BlockTimes:
    """Seconds per image of the blocks of two networks and of the links between them.

    Attributes:
        local: Of each local block by its name, in order.
        output: Of the local network's output layer.
        host: Of each host block by its name, in order; its output layer never runs for a guest.
        links: Of a link by the layers that it joins (see :func:`crossings`), or one number for each link.

    Raises:
        ValueError: A time is negative or no number, or the local network takes none.
    """

    local: Mapping[str, float]
    output: float
    host: Mapping[str, float]
    links: Mapping[str, float] | float = 0.0

    def __post_init__(self) -> None:
        for part, times in zip(PARTS, (self.local, self.output, self.host, self.links), strict=True):
            for name, seconds in times.items() if isinstance(times, Mapping) else [("", times)]:
                _check(seconds, f"{part}/{name}" if name else part)
        if not self.original > 0:
            raise ValueError("the times of the local blocks and its output are all 0; measure them on more images")

    @property
    def original(self) -> float:
        """Seconds τ_0 per image of the local network alone."""
        return sum(self.local.values()) + self.output

    def path(self, path: Path) -> tuple[float, float]:
        """Return the seconds per image of a path on the local side, τ_l, and on the host, τ_h.

        Both links of a cross-connection run on the host, that of a skip-connection on the local side.

        Raises:
            ValueError: The path leads outside the blocks or nowhere, or a link on it has no time.
        """
        local, host = list(self.local.values()), list(self.host.values())
        links = sum(self._link(name) for name in crossings(path, list(self.local), list(self.host)))
        own = sum(local[: path.lout + 1]) + sum(local[path.lin :]) + self.output
        if path.hin is None or path.hout is None:
            return own + links, 0.0
        return own, sum(host[path.hin : path.hout + 1]) + links

    def _link(self, name: str) -> float:
        if not isinstance(self.links, Mapping):
            return self.links
        if name not in self.links:
            raise ValueError(
                f"the times miss the link {name!r}; give its seconds under links, or one number there for every link."
                f"{did_you_mean(name, self.links)}"
            )
        return self.links[name]


def crossings(path: Path, local: Sequence[str], host: Sequence[str]) -> tuple[str, ...]:
    """Name the links of a path by the layer that they read and the block that they lead to.

    Raises:
        ValueError: The path leads outside the blocks, or nowhere.

    Example:
        >>> crossings(Path(0, 1, 1, 2), ["a", "b", "c"], ["x", "y"])
        ('local/a -> host/y', 'host/y -> local/c')
        >>> crossings(Path(0, None, None, 2), ["a", "b", "c"], [])
        ('local/a -> local/c',)
    """
    path = read_path(path, local, host or None)
    out, back = f"local/{local[path.lout]}", f"local/{local[path.lin]}"
    if path.hin is None or path.hout is None:
        return (f"{out} -> {back}",)
    return f"{out} -> host/{host[path.hin]}", f"host/{host[path.hout]} -> {back}"


def read_block_times(file: pathlib.Path | str, local: Sequence[str], host: Sequence[str]) -> BlockTimes:
    """Read the seconds per image of every block from a JSON file, such as were measured on two devices of one's own.

    It holds ``{"local": {"BLOCK": seconds, …}, "output": seconds, "host": {"BLOCK": seconds, …}, "links": seconds}``;
    ``output`` is the local network's output layer, and ``links`` may be an object too, by the names of
    :func:`crossings`.

    Args:
        file: The file.
        local: Names of the local network's blocks.
        host: Names of the host's.

    Raises:
        ValueError: The file is not of this form, misses a block, names an unknown one, or has a negative time.
        FileNotFoundError: There is no such file.
    """
    file = pathlib.Path(file)
    try:
        values = parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    try:
        _check_form(values)
        times = {part: _times(values[part], part, names) for part, names in (("local", local), ("host", host))}
        return BlockTimes(times["local"], values["output"], times["host"], values["links"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def write_block_times(file: pathlib.Path | str, times: BlockTimes) -> None:
    """Write times as :func:`read_block_times` reads them."""
    links = dict(times.links) if isinstance(times.links, Mapping) else times.links
    values = {"local": dict(times.local), "output": times.output, "host": dict(times.host), "links": links}
    pathlib.Path(file).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@torch.inference_mode()
def measure_chain(
    modules: Sequence[nn.Module],
    images: Tensor,
    *,
    rounds: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Measure the seconds per image of modules that follow each other, such as a network's blocks.

    All run once before, which counts for nothing. Then they run by turns, so that what slows the machine down for a
    while falls on all of them, and the median of the rounds counts.

    Args:
        modules: Each reads what the one before makes. They are measured in the mode that they are in.
        images: What the first one reads, a batch of the size that the device will see.
        rounds: How often.
        clock: Reads seconds.

    Returns:
        A time for each module.
    """
    whole_number("rounds", rounds)
    rows = [_chain(modules, images, clock) for _ in range(rounds + 1)]
    return [statistics.median(column) for column in zip(*rows[1:], strict=True)]


def _chain(modules: Sequence[nn.Module], x: Tensor, clock: Callable[[], float]) -> list[float]:
    count, seconds = len(x), []
    x = x.clone()  # the first layer may work in place
    for module in modules:
        _wait(x)
        start = clock()
        x = module(x)
        _wait(x)
        seconds.append((clock() - start) / count)
    return seconds


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _check_form(values: Any) -> None:
    """Refuse a file that is not of the parts it should have."""
    if not isinstance(values, dict) or set(values) != set(PARTS):
        got = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"block times must be an object of {', '.join(PARTS)}, got {got or 'an empty one'}")
    for part in ("local", "host"):
        if not isinstance(values[part], dict):
            raise ValueError(f"{part} must be an object of seconds by block, got {values[part]!r:.100}")


def _times(values: Mapping[str, Any], part: str, blocks: Sequence[str]) -> dict[str, float]:
    """Return the times of blocks in order."""
    known = ", ".join(blocks)
    if missing := [name for name in blocks if name not in values]:
        raise ValueError(f"the time of {part}/{missing[0]} is missing; give the seconds of {known}")
    if unknown := [name for name in values if name not in blocks]:
        raise ValueError(f"{part}/{unknown[0]} is no block; known are {known}.{did_you_mean(unknown[0], blocks)}")
    return {name: values[name] for name in blocks}


def _check(seconds: Any, what: str) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise ValueError(f"the time of {what} must be a number of seconds, got {seconds!r:.100}")
    if seconds < 0:
        raise ValueError(f"the time of {what} is negative, {seconds!r}; give seconds of at least 0")
