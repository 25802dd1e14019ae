"""From a trained network to a bundle on disk, at the width it was trained with or at another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from cleave.architectures import MultiExitNetwork, SplitNetwork, recalibrate_batchnorm
from cleave.architectures.inserts.calibration import METHODS
from cleave.architectures.naming import did_you_mean
from cleave.datamodules import Digits, ImageDataModule
from cleave.datamodules.sources import FileSource
from cleave.deployment import Bundle, export_bundle
from cleave.reports.terminal import console, table
from cleave.scripts.assembly.exit_bundling import Exits, all_edges, exit_partitions, exits_table
from cleave.scripts.assembly.restoring import Restored


def write_bundle(
    network: nn.Module,
    data: ImageDataModule,
    directory: Path,
    *,
    config: dict[str, Any],
    metrics: Mapping[str, Any],
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
        metrics: What was measured of the network; non-numbers are refused.
        sample: Test images kept in the bundle with their expected outputs.
        exits: How the exits of a network that has some are exported.
        overwrite: Replace a bundle that is there.

    Returns:
        The folder written.
    """
    network, exits = network.cpu().float().eval(), exits or Exits()
    measured = {name: float(value) for name, value in metrics.items()}
    parts, codecs, specs = exit_partitions(network, data.input, exits, measured)
    if isinstance(network, MultiExitNetwork):
        measured = all_edges(network, parts, codecs, specs, measured)
    images = data.sample_batch("test", sample)["images"]
    bundle = export_bundle(
        directory,
        parts,
        codecs,
        data.input,
        data.class_names,
        images,
        config=config,
        metrics=measured,
        exits=specs,
        policy=exits.policy,
        overwrite=overwrite,
    )
    bundle_table(bundle, directory)
    return directory


def bundle_table(bundle: Bundle, directory: Path) -> None:
    """Print the partitions of a bundle, their parity, and where it lies."""
    rows = [
        (p.name, p.placement, f"{p.file.bytes:,}", f"{p.macs:,}", f"{p.params:,}") for p in bundle.manifest.partitions
    ]
    table("Partitions", rows, ("partition", "placement", "file bytes", "MACs", "parameters"))
    exits_table(bundle)
    console.print(f"Parity of the loaded files: {parity_words(bundle)}", highlight=False)
    console.print(f"Bundle: {directory}", soft_wrap=True, highlight=False)


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
    if not restored.other_bits or not isinstance(network, SplitNetwork) or network.widths:
        return None
    bits = restored.config.codec.bits
    to_fit = network.bits != bits
    if to_fit and not count:
        raise ValueError(f"codec.bits={bits}: a network trained in float needs recalibrate.batches of at least 1")
    if not count:
        return "not recalibrated"
    data.prepare_data()
    data.setup("fit")
    if to_fit:
        low, high = network.calibrate(_batches(data, count), bits, method=method)
        console.print(f"codes of {bits} bits from {low:.4g} to {high:.4g}, by {method}", highlight=False)
    layers = recalibrate_batchnorm(network, network.decoder, _batches(data, count))
    console.print(f"{layers} BatchNorm layers of the decoder measured again at {bits} bits", highlight=False)
    return f"calibrated by {method}" if to_fit else "recalibrated"


def _batches(data: ImageDataModule, count: int) -> Iterator[Tensor]:
    for batch in itertools.islice(data.train_dataloader(), count):
        yield data.input.normalize(batch["images"])
