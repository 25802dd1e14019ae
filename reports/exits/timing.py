"""Wall-clock seconds of a network with early exits, and of its backbone alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from cleave.architectures import MultiExitNetwork
from cleave.datamodules import ImageDataModule
from cleave.deployment import Exited, ExitPolicy, build_policy, expected_cost


def timed_batches(data: ImageDataModule, size: int, count: int, device: torch.device) -> list[Tensor]:
    """Return test images, normalised and on the device, in up to ``count`` batches: full ones, if there is one."""
    images = data.sample_batch("test", size * count)["images"]
    batches = list(data.input.normalize(images.to(device)).split(size))
    return [batch for batch in batches if len(batch) == size] or batches


def exit_seconds(network: MultiExitNetwork, batches: Sequence[Tensor], count: int) -> tuple[list[float], float]:
    """Return the median seconds per image of leaving at each exit, and those of the backbone alone."""
    last = len(network.exit_names) - 1
    forced = [forced_exit(exit, last + 1) for exit in range(last + 1)]
    calls = [lambda images, policy=policy: network.run(images, policy) for policy in forced]
    rows = _interleaved([*calls, lambda images: backbone_alone(network, images)], batches, count)
    *exits, backbone = (statistics.median(column) for column in zip(*rows, strict=True))
    return exits, backbone


def forced_exit(exit: int, exits: int) -> ExitPolicy:
    """Return a policy by which every sample leaves at one exit."""
    return build_policy("confidence", None, exits=exits, latest=exit)


def backbone_alone(network: MultiExitNetwork, images: Tensor) -> Tensor:
    """Run the backbone as if it had neither exits nor bottleneck."""
    for stage in network.stages:
        images = stage(images)
    return images


def wall_clock(
    network: MultiExitNetwork, policy: ExitPolicy, batches: Sequence[Tensor], count: int
) -> dict[str, Any] | None:
    """Run the network with a policy and the backbone alone in turns; return seconds and MACs of both, and their ratios.

    Args:
        network: The network, in eval mode.
        policy: Decides at each exit.
        batches: Normalised images on the network's device.
        count: How many batches to time, repeated from the first where there are fewer; 0 measures nothing.
    """
    if not count:
        return None
    left: list[Tensor] = []

    def run(images: Tensor) -> Exited:
        exited = network.run(images, policy)
        left.append(exited.index)
        return exited

    pairs = _interleaved([run, lambda images: backbone_alone(network, images)], batches, count)
    own, backbone = zip(*pairs, strict=True)
    # The first call warmed up; the others are those that were timed.
    macs = expected_cost(torch.cat(left[1:]), network.exit_costs(policy))
    return {
        "batch_size": len(batches[0]),
        "batches": count,
        "seconds": quartiles(own),
        "backbone_seconds": quartiles(backbone),
        "ratio": quartiles([a / b for a, b in pairs]) | {"mean": sum(own) / sum(backbone)},
        "macs_ratio": macs / network.backbone_macs,
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles around it."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"lower": lower, "median": median, "upper": upper}


@torch.inference_mode()
def _interleaved(
    calls: Sequence[Callable[[Tensor], Any]], batches: Sequence[Tensor], count: int
) -> list[tuple[float, ...]]:
    """Time the calls by turns on each batch, after a first round that counts for nothing; seconds per image."""
    for call in calls:
        call(batches[0])
    return [tuple(_seconds(call, images) / len(images) for call in calls) for images in islice(cycle(batches), count)]


def _seconds(call: Callable[[Tensor], Any], images: Tensor) -> float:
    _wait(images.device)
    start = time.perf_counter()
    call(images)
    _wait(images.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
