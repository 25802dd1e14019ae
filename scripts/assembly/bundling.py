"""The way from a trained network to a bundle on disk, at the width it was trained with or at another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from cleave.architectures import StagedNetwork, recalibrate_batchnorm
from cleave.architectures.inserts.calibrating.calibration import METHODS
from cleave.architectures.inserts.finite import DIVERGED, NumberError, check_learned
from cleave.architectures.naming import did_you_mean
from cleave.architectures.network.outputs import LOGITS
from cleave.architectures.partitions import Partitions, network_partitions
from cleave.datamodules import Digits, ImageDataModule
from cleave.datamodules.sources import FileSource
from cleave.deployment import (
    ENVELOPE_BYTES,
    Bundle,
    ExitPolicy,
    ExitSpec,
    OutputSpec,
    Route,
    check_parts,
    export_bundle,
    read_policy,
)
from cleave.deployment.exits.specs import state_crossings
from cleave.lightning_modules import Measured
from cleave.lightning_modules.evaluators import network_policy
from cleave.reports.rates.results import Point
from cleave.reports.terminal import say, table
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.networks import plain_value
from cleave.scripts.assembly.restoring import Restored


class Exits(NamedTuple):
    """How a network is exported.

    Attributes:
        policy: Who decides at its exits; ``None``: all samples go on to the end.
        placements: Where each partition runs; ``None``: as its bottlenecks say.
    """

    policy: ExitPolicy | None = None
    placements: Sequence[str] | None = None


def chosen_exits(
    network: StagedNetwork, data: ImageDataModule, config: DictConfig, options: Any = None, links: Any = None
) -> Exits:
    """Return what the options of ``conf/export.yaml`` and the config a network was trained with say of its exits.

    What cannot be exported is refused here, before any time is spent on training or testing.

    Args:
        network: The network.
        data: Its images.
        config: What it was trained with, which holds a policy of its own.
        options: ``policy_file`` and ``placements``; null takes the network's own.
        links: ``placements`` of a path through two networks; null takes those that it was trained with.

    Raises:
        ValueError: A policy is given for a network without exits, or policy or placements do not fit it.
    """
    given = {} if options is None else {key: value for key, value in plain(options).items() if value is not None}
    policy: ExitPolicy | None = None
    if "policy_file" in given and not network.exits:
        raise ValueError(
            f"exits.policy_file={given['policy_file']} has no meaning here: the checkpoint's network has no exits"
        )
    if "policy_file" in given:
        policy = read_policy(Path(given["policy_file"]))
    elif network.exits:
        own = config.exits.policy
        # Without a policy none leaves early, but the last exit of an ensemble answers as the network does.
        settings = plain(own) if own is not None else {"kind": "ensemble"} if network.ensemble is not None else None
        policy = None if settings is None else network_policy(network, settings)
    exits = Exits(policy, _placements(network, config, given.get("placements"), links))
    _route(network, data, network_partitions(network, data.input, exits.placements, exits.policy), exits.policy)
    return exits


def _placements(network: StagedNetwork, config: DictConfig, exits: Any, links: Any) -> list[str] | None:
    """Return where the partitions run, as exits or links say it."""
    given = None if links is None else plain_value(links.get("placements"))
    if given is not None and not network.links:
        raise ValueError(f"links.placements={given} has no meaning here: the checkpoint's network has no links")
    if given is not None and exits is not None:
        raise ValueError(f"give either links.placements={given} or exits.placements={exits}, not both")
    if given is None and network.links:
        given = plain_value((config.get("links") or {}).get("placements"))
    return exits if exits is not None else given


def _route(network: StagedNetwork, data: ImageDataModule, found: Partitions, policy: ExitPolicy | None) -> Route:
    outputs = outputs_of(network, data)
    more = {"draws": found.draws, "exits": found.exits, "policy": policy}
    return check_parts(found.parts, found.edges, input=data.input, outputs=outputs, **more)  # type: ignore[arg-type]


def outputs_of(network: StagedNetwork, data: ImageDataModule) -> list[OutputSpec]:
    """Describe what a classifier returns."""
    return [OutputSpec(name, "logits", network.shapes[name], tuple(data.class_names)) for name in network.results]


def write_bundle(
    network: StagedNetwork,
    data: ImageDataModule,
    directory: Path,
    *,
    config: dict[str, Any],
    metrics: Mapping[str, Any],
    measured: Measured | None = None,
    points: Sequence[Point] = (),
    sample: int = 16,
    exits: Exits | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a network as partitions, gated by their parity, and say what was written.

    Args:
        network: Trained network; moved to the CPU, in float32 and eval mode.
        data: The data it was tested on, for its input, class names and sample images.
        directory: The folder to write.
        config: The resolved config.
        metrics: What was measured of the network; what was not finite in the last validation, of weights that are not
            the exported ones, is left out.
        measured: The same by what it means; ``None`` where it was not tested.
        points: The same as a comparison of runs takes it, which reads it from the manifest.
        sample: Test images kept in the bundle with their expected outputs.
        exits: How its exits are exported.
        overwrite: Replace a bundle that is there.

    Returns:
        The folder written.

    Raises:
        NumberError: A metric of the test is not finite, or the network's weights are not.
    """
    check_learned(network, "the network")
    network, exits = network.cpu().float().eval(), exits or Exits()
    accuracies = measured.exits if measured else None
    found = network_partitions(network, data.input, exits.placements, exits.policy, accuracies)
    described: dict[str, Any] = dict(_finite(metrics))
    if measured is not None:
        route = _route(network, data, found, exits.policy)
        described = all_sent(described, network, measured, route, found.exits, exits.policy)
    if points and points[0].kind == "run":
        described["points"] = [dataclasses.asdict(point) for point in points]
    bundle = export_bundle(
        directory,
        found.parts,
        found.edges,
        input=data.input,
        outputs=outputs_of(network, data),
        images=data.sample_batch("test", sample)["images"],
        draws=found.draws,
        config=config,
        metrics=described,
        exits=found.exits,
        policy=exits.policy,
        envelope=network.envelope,
        overwrite=overwrite,
    )
    bundle_table(bundle, directory)
    return directory


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {name: float(value) for name, value in metrics.items()}
    for name, value in found.items():
        if name.startswith("test/") and not math.isfinite(value):
            raise NumberError(f"{name} is {value}: {DIVERGED}")
    return {name: value for name, value in found.items() if math.isfinite(value)}


def all_sent(
    metrics: Mapping[str, float],
    network: StagedNetwork,
    measured: Measured,
    route: Route,
    exits: Sequence[ExitSpec],
    policy: ExitPolicy | None,
) -> dict[str, float]:
    """Return what was measured with the bytes of all that is sent, of which testing knows bottlenecks' codes alone.

    Features, and what a policy must know of exits before, are as many bytes of each sample that goes on there.
    """
    found, order = dict(metrics), list(route.order)
    states = state_crossings(policy, exits, network.shapes[LOGITS][0], route) if exits else []
    for crossing in (*route.crossings, *states):
        if crossing.tensor in network.bottlenecks:
            continue
        length = 4.0 * math.prod(crossing.codec.shape) + (ENVELOPE_BYTES if network.envelope else 0)
        found.pop("test/payload_zstd_bytes", None)  # of the bottlenecks' bytes alone
        found["test/payload_bytes"] = found.get("test/payload_bytes", 0.0) + length
        if measured.policy is not None:
            place = order.index(crossing.producer)
            left = [item.name for item in exits if order.index(item.partition) <= place]
            known = found.get("test/policy/payload_bytes", 0.0)
            going = 1.0 - sum(measured.policy.shares[name] for name in left)
            found["test/policy/payload_bytes"] = known + length * going
    for of in ("input", "feature", "file"):
        if (name := f"test/payload_to_{of}") in found:
            found[name] *= found["test/payload_bytes"] / metrics["test/payload_bytes"]
    return found


def bundle_table(bundle: Bundle, directory: Path) -> None:
    """Print the partitions of a bundle, its exits, their parity, and where it lies."""
    rows = [
        (p.name, p.placement, f"{p.file.bytes:,}", f"{p.macs:,}", f"{p.params:,}") for p in bundle.manifest.partitions
    ]
    table("Partitions", rows, ("partition", "placement", "file bytes", "MACs", "parameters"))
    exits_table(bundle)
    say(f"Parity of the loaded files: {parity_words(bundle)}")
    say(f"Bundle: {directory}")


def exits_table(bundle: Bundle) -> None:
    """Print the exits of a bundle and who decides there; nothing where it has none."""
    manifest = bundle.manifest
    policy = manifest.policy
    thresholds = [*(policy.thresholds if policy is not None else [None] * len(manifest.exits)), None]
    rows = [
        (
            item.name,
            item.partition,
            placement,
            f"{item.macs:,}",
            "" if item.accuracy is None else f"{item.accuracy:.4f}",
            "" if threshold is None else f"{threshold:g}",
        )
        for item, placement, threshold in zip(manifest.exits, manifest.exit_placements, thresholds, strict=False)
    ]
    header = ("exit", "partition", "placement", "MACs until there", "accuracy", "threshold")
    table(f"Exits by {'no policy: all go to the end' if policy is None else policy.kind}", rows, header)


def parity_words(bundle: Bundle) -> str:
    """What the gate measured, for a person."""
    parity = bundle.manifest.parity
    differing = 100 * parity["codes_differing"]
    return f"largest difference {parity['max_difference']:.1e}, {differing:.2g} % of codes one step off"


def example_input(data: ImageDataModule) -> str:
    """What to give ``infer.py`` as its first input: the embedded digits, or a file of the test set where it has any."""
    if isinstance(data, Digits):
        return "digits"
    source = data.split("test")
    return source.name(0) if isinstance(source, FileSource) else "IMAGE"


def recalibrate(restored: Restored, data: ImageDataModule, settings: DictConfig) -> str | None:
    """Fit a network to another width of codes than it was trained with, where ``codec.bits`` asks for one.

    One trained in float gets a range for its codes; the decoder's BatchNorm statistics are measured again, unless the
    network was trained for several widths: those of the nearest serve.

    Args:
        restored: The network, and whether it has another width now.
        data: Gives the training images.
        settings: ``batches`` and ``range`` of ``conf/evaluate.yaml``'s ``recalibrate``.

    Returns:
        What was done, in words; ``None`` where the network stays as it was trained.

    Raises:
        ValueError: A setting is out of range, or a range is needed, but ``batches`` is 0.
    """
    network, count, method = restored.network, settings.batches, settings.range
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"recalibrate.batches must be a whole number of at least 0, got {count!r}")
    if method not in METHODS:
        close = did_you_mean(str(method), METHODS)
        raise ValueError(f"recalibrate.range must be one of {', '.join(METHODS)}, got {method!r}.{close}")
    if not restored.other_bits:
        return None
    done = [_recalibrate(restored, data, cut, count, method) for cut in network.bottlenecks]
    return next((words for words in done if words is not None), None)


def _recalibrate(restored: Restored, data: ImageDataModule, cut: str, count: int, method: str) -> str | None:
    network, bits = restored.network, restored.config.codec.bits
    bottleneck = network.bottlenecks[cut]
    if bottleneck.widths:
        return None
    to_fit = bottleneck.bits != bits
    if to_fit and not count:
        raise ValueError(f"codec.bits={bits}: a network trained in float needs recalibrate.batches of at least 1")
    if not count:
        return "not recalibrated"
    data.prepare_data()
    data.setup("fit")
    at = f" at {cut}" if len(network.bottlenecks) > 1 else ""
    if to_fit:
        low, high = network.calibrate(_batches(data, count), cut, bits, method=method)
        say(f"codes of {bits} bits{at} from {low:.4g} to {high:.4g}, by {method}")
    layers = recalibrate_batchnorm(network, bottleneck.decoder, _batches(data, count))
    if layers:
        say(f"{layers} BatchNorm layers of the decoder{at} measured again at {bits} bits")
    return f"calibrated by {method}" if to_fit else "recalibrated"


def _batches(data: ImageDataModule, count: int) -> Iterator[Tensor]:
    for batch, _ in zip(data.train_dataloader(), range(count), strict=False):
        yield data.input.normalize(torch.as_tensor(batch["images"]))
