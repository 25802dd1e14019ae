"""What a run measured, as points of bytes and accuracy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cleave.architectures import Cost, StagedNetwork
from cleave.lightning_modules import Measured
from cleave.reports.rates.results import Point


@dataclasses.dataclass(frozen=True)
class Run:
    """What a point says of the run that it is of.

    Args:
        method: The method in words.
        words: What tells the network from others that are split alike, for the label.
        beta: Weight of a rate in the objective, if there is one.
        epochs: Epochs trained, over all steps.
        seconds: Wall-clock seconds of training, validation included.
        seed: Seed of the run.
        backbone: Name of the backbone.
        checkpoint: The checkpoint that was tested.
    """

    method: str
    words: tuple[str, ...] = ()
    beta: float | None = None
    epochs: int | None = None
    seconds: float | None = None
    seed: int | None = None
    backbone: str | None = None
    checkpoint: str | None = None


def measured_points(run: Run, measured: Measured | None, network: StagedNetwork) -> list[Point]:
    """Return one point for each width of a network that is split; none where nothing was tested.

    An unsplit network is the baseline that whole images are sent to. Exits are tested under their policy; around a
    split a point holds the mean bytes over all images, those that leave on the device included. A network of exits
    alone, and one with a skip-connection, takes whole images as the baseline does.

    Args:
        run: Which run it was.
        measured: What its test came to.
        network: The network, for what its encoder costs and how large its input is.
    """
    if measured is None or measured.accuracy is None:
        return []
    known: dict[str, Any] = {
        "epochs": run.epochs,
        "train_seconds": run.seconds,
        "seed": run.seed,
        "backbone": run.backbone,
        "checkpoint": run.checkpoint,
    }
    if not network.bottlenecks:
        return [_unsplit(run, measured, network, known)]
    costs = _on_the_device(network)
    parts: dict[str, Any] = {
        "encoder_macs": sum(cost.macs for cost in costs),
        "encoder_params": sum(cost.params for cost in costs),
    }
    found = []
    for width in measured.widths:
        policy = measured.policy if len(measured.widths) == 1 else None
        accuracy, sent = width.accuracy, width.payload_bytes
        if policy is not None and policy.payload_bytes is not None:
            accuracy, sent = policy.accuracy, policy.payload_bytes
        if accuracy is None or not sent:
            continue
        found.append(
            Point(
                method=run.method,
                label=_label(run, network, width.bits),
                accuracy=accuracy,
                payload_bytes=sent,
                payload_zstd_bytes=None if policy is not None else width.payload_zstd_bytes,
                bits=width.bits,
                **parts,
                **known,
            )
        )
    return found


def _on_the_device(network: StagedNetwork) -> list[Cost]:
    """Return the costs of what runs before the first bottleneck; on a path, of all that runs on its first side."""
    costs = network.costs()
    if costs[0].side:
        return [cost for cost in costs if cost.side == costs[0].side]
    first = network.cuts.index(next(iter(network.bottlenecks)))
    device = set(network.cuts[: first + 1])
    return [cost for cost in costs if cost.name in device and cost.kind != "decoder"]


def _unsplit(run: Run, measured: Measured, network: StagedNetwork, known: dict[str, Any]) -> Point:
    accuracy = measured.policy.accuracy if measured.policy is not None else measured.accuracy
    assert accuracy is not None
    return Point(
        run.method,
        ", ".join(["raw uint8 input", *(run.words if network.links else ()), *_exits_words(network)]),
        accuracy=accuracy,
        payload_bytes=float(math.prod(network.input_shape)),
        encoder_macs=0,
        encoder_params=0,
        kind="run" if network.exits or network.links else "baseline",
        **known,
    )


def _label(run: Run, network: StagedNetwork, bits: int | None) -> str:
    words = [" and ".join(network.bottlenecks), *run.words, f"{bits} bits" if bits else "prior"]
    words += _exits_words(network)
    if run.beta is not None:
        words.append(f"β {run.beta:g}")
    return ", ".join(words)


def _exits_words(network: StagedNetwork) -> list[str]:
    return [f"exits at {', '.join(network.exits[:-1])}"] if network.exits else []
