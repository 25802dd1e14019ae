"""A bundle in memory, whole or one side of it: verified, loaded, and able to test itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..naming import listed
from ..precision import autocast_off
from ..runtime.inputs import Input
from ..runtime.walk import Message, Visit, Walk
from .edges import Crossing
from .files import BundleError, read_verified
from .manifest import Manifest, read_manifest
from .parity import Parity, Tolerance, compare, through_bytes
from .specs import PartitionSpec, TensorSpec
from .torchscript import ScriptError, load_torchscript

# PyTorch profiles in the first run of a partition and compiles in the second.
_WARM_UPS = 3
_NOTHING = contextlib.nullcontext()
# Signatures of calls that a partition remembers; a service sees a handful of batch sizes.
_MOST_KNOWN = 256
_MAX_HEADER_BYTES = 2**20


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
        self._names = [item.name for item in spec.inputs]
        self._outputs = [item.name for item in spec.outputs]
        # What came in and out before and fitted: the checks look at dtypes and shapes alone, so once is enough.
        self._fitting: set[tuple[Any, ...]] = set()

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the partition.

        Args:
            tensors: At least its inputs, by name.

        Returns:
            Its outputs by name, on its device.

        Raises:
            BundleError: An input or output is missing or not of the dtype and shape that the manifest states, or the
                partition cannot compute with its inputs.
        """
        try:
            given = [tensors[name] for name in self._names]
        except KeyError:
            missing = [name for name in self._names if name not in tensors]
            raise BundleError(f"{self._where} lacks its inputs {listed(missing)}") from None
        self._check(self.spec.inputs, given)
        results = self._computed(given)
        if len(results) != len(self.spec.outputs):
            raise BundleError(f"{self._where} returned {len(results)} tensors instead of {len(self.spec.outputs)}")
        self._check(self.spec.outputs, results)
        return dict(zip(self._outputs, results, strict=True))

    def warm_up(self, sample: Mapping[str, Tensor]) -> None:
        """Run on a sample, so that no request waits for the first runs, in which PyTorch profiles and compiles.

        Raises:
            BundleError: The partition cannot compute with it.
        """
        given = [sample[name] for name in self._names]
        for _ in range(_WARM_UPS):
            self._computed([tensor[:1] if tensor.ndim else tensor for tensor in given])
        self._computed(given)

    @property
    def _where(self) -> str:
        return f"partition {self.spec.name}"

    def _check(self, specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> None:
        try:
            found = (id(specs), *[item for tensor in tensors for item in (tensor.dtype, tensor.shape)])
            if found in self._fitting:
                return
        except (AttributeError, TypeError):  # no tensors; refused below
            found = ()
        for spec, tensor in zip(specs, tensors, strict=True):
            spec.check(tensor, self._where)
        if len(self._fitting) < _MOST_KNOWN:
            self._fitting.add(found)

    def _computed(self, given: Sequence[Tensor]) -> tuple[Any, ...]:
        try:
            with _NOTHING if torch.is_inference_mode_enabled() else torch.inference_mode(), autocast_off(self.device):
                result = self.module(*[x if x.device == self.device else x.to(self.device) for x in given])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ScriptError) as error:
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip(self._names, given, strict=True))
            raise BundleError(f"{self._where} cannot compute with {shapes}: {error}") from error
        return result if isinstance(result, tuple) else (result,)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One model, or its part for one placement, loaded from a folder.

    Args:
        directory: Where it was loaded from.
        manifest: What it says about itself.
        partitions: The partitions that were loaded, callable, by name.
        samples: For each placement that was loaded, what comes to it of a sample batch and what its partitions make
            of that, by name.
        device: Where the partitions run.
    """

    directory: Path
    manifest: Manifest
    partitions: dict[str, Partition]
    samples: dict[str, dict[str, Tensor]]
    device: torch.device

    @property
    def input(self) -> Input:
        """What the network takes; for images also how a picture becomes that."""
        return self.manifest.input

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the logits."""
        return self.manifest.class_names

    @property
    def placements(self) -> tuple[str, ...]:
        """The placements that were loaded."""
        return tuple(self.samples)

    def self_test(self) -> Parity:
        """Run every partition that was loaded on the sample batch, through real bytes, against what was stored with it.

        Each partition is fed what the one before it *should* have sent, so that a difference is found where it
        arises. The tolerance allows for another processor's arithmetic: the files themselves are verified by digest.

        Returns:
            The differences.

        Raises:
            ParityError: An output differs.
        """
        parity = Parity()
        for placement, sample in self.samples.items():
            test = _SelfTest(self, placement)
            emitted = {name for part in test.parts for name in part.outputs}
            arrived = {name: tensor for name, tensor in sample.items() if name not in emitted}
            batch = len(next(iter(sample.values())))
            test.step(Visit(tensors=arrived), Message(tuple(range(batch)), {}))
            parity |= test.parity
        return parity


class _SelfTest(Walk):
    """A walk in which every partition hands on what it should have returned."""

    def __init__(self, bundle: Bundle, placement: str) -> None:
        super().__init__(bundle.manifest.route, placement)
        self.bundle, self.sample, self.parity = bundle, bundle.samples[placement], Parity()

    def run(self, name: str, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        expected = {item.name: self.sample[item.name] for item in self.bundle.partitions[name].spec.outputs}
        codec = self.route.behind(name)
        tolerance = Tolerance.across_processors(codec.levels if codec else 0)
        self.parity |= compare(expected, self.bundle.partitions[name](arguments), f"partition {name}", tolerance)
        return expected

    def send(self, crossing: Crossing, tensors: dict[str, Tensor], rows: Sequence[int]) -> None:
        through_bytes(crossing.codec, tensors, f"partition {crossing.producer}")

    def receive(self, crossing: Crossing, payload: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        raise BundleError(f"a self-test takes {crossing.tensor} from its sample")


def load_bundle(
    directory: str | Path,
    device: str | torch.device = "cpu",
    placement: str | None = None,
    warm_up: bool = True,
) -> Bundle:
    """Load a bundle; nothing is deserialised before every file's length and digest have been verified.

    The digests find damage. A TorchScript file is a program: load bundles from people you trust.

    Args:
        directory: The bundle's folder.
        device: Where its partitions are to run.
        placement: The side to load; only the manifest and that side's files are looked at. ``None`` loads all.
        warm_up: Run each partition on the bundle's sample, so that the first request takes no longer than the others.

    Returns:
        The bundle, ready to run.

    Raises:
        BundleError: The manifest is damaged or contradicts itself, the bundle lacks the placement, a file is missing,
            changed, damaged, a link, or outside the folder, ``device`` is none that torch knows, or a partition cannot
            compute with the bundle's sample.

    Example:
        >>> device = load_bundle("bundles/digits", placement="device")  # doctest: +SKIP
    """
    directory, device = Path(directory), _known_device(device)
    manifest = read_manifest(directory)
    placements = manifest.route.placements if placement is None else (placement,)
    specs = [spec for each in placements for spec in manifest.at(each)]
    contents = {spec.name: read_verified(directory, spec.file) for spec in specs}
    stored = {each: read_verified(directory, manifest.samples[each]) for each in placements}
    samples = {each: _read_sample(content, manifest, each) for each, content in stored.items()}
    partitions = {}
    for name in (name for name in manifest.route.order if name in contents):
        spec = manifest.partition(name)
        module = load_torchscript(contents.pop(name), device, f"partition {name}")
        partitions[name] = Partition(spec, module, device)
        if warm_up:
            partitions[name].warm_up({**manifest.route.settings, **samples[spec.placement]})
    return Bundle(directory, manifest, partitions, samples, device)


def _known_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BundleError(f"device must be one that torch knows, such as 'cpu' or 'cuda:0', got {device!r}") from error


def _read_sample(content: bytes, manifest: Manifest, placement: str) -> dict[str, Tensor]:
    """Read a placement's sample and check that it has every tensor that a self test needs."""
    file = manifest.samples[placement].file
    if (header := int.from_bytes(content[:8], "little")) > _MAX_HEADER_BYTES:
        raise BundleError(
            f"{file} is not a safetensors file: its header claims {header} bytes, more than {_MAX_HEADER_BYTES}"
        )
    try:
        sample = safetensors.torch.load(content)
    # Besides its own error, the reader answers broken files with KeyError, ValueError, RuntimeError, …
    except Exception as error:
        raise BundleError(f"{file} is not a safetensors file: {error}") from error
    wanted = manifest.sample_specs(placement)
    if sample.keys() != wanted.keys():
        raise BundleError(f"{file} must hold {listed(sorted(wanted))}, it holds {listed(sorted(sample))}")
    for name, spec in wanted.items():
        spec.check(sample[name], f"{file}, {name}")
    if len({len(tensor) for tensor in sample.values()}) != 1:
        raise BundleError(f"{file} must hold as many samples in each tensor")
    if not len(next(iter(sample.values()))):
        raise BundleError(f"{file} holds no samples, so a self-test would test nothing: export the bundle again")
    return sample
