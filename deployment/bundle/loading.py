"""A bundle in memory: verified, loaded, and able to test itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..runtime.preprocess import ImageInput
from .files import BundleError, read_verified
from .manifest import Manifest, read_manifest
from .parity import Parity, Tolerance, compare
from .signatures import EXIT_LOGITS, part_arguments
from .specs import PartitionSpec
from .torchscript import load_torchscript


class Partition:
    """One loaded partition, called with named tensors.

    Args:
        spec: Its entry in the manifest.
        module: The loaded file.
        device: Where it runs; inputs are brought there.
    """

    def __init__(self, spec: PartitionSpec, module: nn.Module, device: torch.device) -> None:
        self.spec = spec
        self.module = module
        self.device = device

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the partition.

        Args:
            tensors: At least its inputs, by name.

        Returns:
            Its outputs by name, on its device.

        Raises:
            BundleError: An input or output is missing or not of the dtype and shape that the manifest states.
        """
        where = f"partition {self.spec.name}"
        if missing := [spec.name for spec in self.spec.inputs if spec.name not in tensors]:
            raise BundleError(f"{where} lacks its inputs {', '.join(missing)}")
        for spec in self.spec.inputs:
            spec.check(tensors[spec.name], where)
        with torch.inference_mode():
            result = self.module(*(tensors[spec.name].to(self.device) for spec in self.spec.inputs))
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(self.spec.outputs):
            raise BundleError(f"{where} returned {len(results)} tensors instead of {len(self.spec.outputs)}")
        for spec, tensor in zip(self.spec.outputs, results, strict=True):
            spec.check(tensor, where)
        return {spec.name: tensor for spec, tensor in zip(self.spec.outputs, results, strict=True)}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """All parts of one model, loaded from a folder.

    Args:
        directory: Where it was loaded from.
        manifest: What it says about itself.
        partitions: The partitions, callable, by name.
        sample: A batch of ``images`` uint8 (B, C, H, W) and the expected outputs of each partition on it, under
            ``PARTITION.OUTPUT``; behind a lossy codec, whose libraries may differ from machine to machine, also what
            it delivered of them, under ``PARTITION.delivered.OUTPUT``.
        device: Where the partitions run.
    """

    directory: Path
    manifest: Manifest
    partitions: dict[str, Partition]
    sample: dict[str, Tensor]
    device: torch.device

    @property
    def input(self) -> ImageInput:
        """How a picture becomes the first partition's input."""
        return self.manifest.input

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the logits."""
        return self.manifest.class_names

    def self_test(self) -> Parity:
        """Run every partition on the sample batch, through real bytes, against the outputs stored with it.

        Each partition is fed what the one before it *should* have sent, so that a difference is found where it
        arises. The tolerance allows for another processor's arithmetic: the files themselves are verified by digest.

        Returns:
            The differences.

        Raises:
            ParityError: An output differs.
        """
        parity = Parity()
        received: dict[str, Tensor] = {"images": self.sample["images"]}
        before: Tensor | None = None
        for index, name in enumerate(self.manifest.route):
            spec = self.partitions[name].spec
            codec = self.manifest.codecs[index] if index < len(self.manifest.codecs) else None
            expected = {item.name: self.sample[f"{name}.{item.name}"] for item in spec.outputs}
            actual = self.partitions[name](part_arguments(spec.signature.inputs, received, codec, before))
            before = expected.get(EXIT_LOGITS, before)
            levels = codec.levels if codec else 0
            parity |= compare(expected, actual, f"partition {name}", Tolerance.across_processors(levels))
            if codec:
                received = codec.decode(codec.encode(expected))
                if not codec.lossless:
                    received |= {item: self.sample[f"{name}.delivered.{item}"] for item in codec.sends}
        return parity


def load_bundle(directory: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load a bundle; nothing is deserialised before every file's length and digest have been verified.

    The digests find damage. A TorchScript file is a program: load bundles from people you trust.

    Args:
        directory: The bundle's folder.
        device: Where its partitions are to run.

    Returns:
        The bundle, ready to run.

    Raises:
        BundleError: The manifest is damaged or contradicts itself, or a file is missing, changed, a link, or outside
            the folder.
    """
    directory, device = Path(directory), torch.device(device)
    manifest = read_manifest(directory)
    contents = {spec.name: read_verified(directory, spec.file) for spec in manifest.partitions}
    sample = _read_sample(read_verified(directory, manifest.sample), manifest)
    partitions = {}
    for spec in manifest.partitions:
        try:
            module = load_torchscript(contents.pop(spec.name), device)
        except RuntimeError as error:
            raise BundleError(
                f"partition {spec.name} cannot be loaded by torch {torch.__version__}: {error}"
            ) from error
        partitions[spec.name] = Partition(spec, module, device)
    return Bundle(directory, manifest, partitions, sample, device)


def _read_sample(content: bytes, manifest: Manifest) -> dict[str, Tensor]:
    """Read the sample batch and check that it has every tensor that a self test needs."""
    file = manifest.sample.file
    try:
        sample = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise BundleError(f"{file} is not a safetensors file: {error}") from error
    first = manifest.partition(manifest.route[0])
    wanted = {"images": first.inputs[0]}
    wanted |= {f"{spec.name}.{output.name}": output for spec in manifest.partitions for output in spec.outputs}
    for name, codec in zip(manifest.route, manifest.codecs, strict=False):
        if not codec.lossless:
            sent = [output for output in manifest.partition(name).outputs if output.name in codec.sends]
            wanted |= {f"{name}.delivered.{output.name}": output for output in sent}
    if sample.keys() != wanted.keys():
        raise BundleError(f"{file} must hold {', '.join(sorted(wanted))}, it holds {', '.join(sorted(sample))}")
    for name, spec in wanted.items():
        spec.check(sample[name], f"{file}, {name}")
    return sample
