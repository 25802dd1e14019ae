"""Writing a bundle, and refusing to write one that does not compute what the network computes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ...exits.policy import ExitPolicy
from ...exits.specs import ExitSpec, check_exits, check_places
from ...precision import autocast_off
from ...runtime.inputs import Input
from ...runtime.walk import Walk, walk_all
from ..draws import Draw
from ..edges import Crossing, Edge, Signature
from ..files import BundleError, FileEntry, check_name
from ..loading import Bundle, load_bundle
from ..manifest import Manifest, route_results, write_manifest
from ..parity import ParityError, through_bytes
from ..route import Route
from ..specs import OutputSpec, PartitionSpec, TensorSpec, check_placement
from ..torchscript import FORMAT, save_torchscript
from .data_dependence import data_dependent_lines
from .folder import new_folder
from .gate import first_sample, parity_gate, run_module
from .private import without_paths

MIN_SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Part:
    """One partition to be exported.

    Args:
        name: Its name, unique in the bundle; letters, digits, ``_``, ``.`` and ``-``.
        placement: Where it is to run, a free name of the same letters: ``device``, ``edge``, ``server``.
        module: Takes its inputs by position and returns a tensor, or a tuple of tensors. Left as it is: a copy on the
            CPU, in eval mode, is exported.
        inputs: Names of the inputs in order: the network's input, what codecs deliver, such as ``layer2.codes``, and
            codecs' settings, such as ``layer2.levels``, and draws, such as ``layer2.noise``.
        outputs: Names of the outputs in order: what codecs send, the logits of an exit, outputs of the network.
        macs: Multiply-accumulates per sample, if known.
    """

    name: str
    placement: str
    module: nn.Module
    inputs: Sequence[str]
    outputs: Sequence[str]
    macs: int | None = None

    @property
    def signature(self) -> Signature:
        """The part as its route sees it."""
        return Signature(self.name, self.placement, tuple(self.inputs), tuple(self.outputs))


def export_bundle(
    directory: str | Path,
    parts: Sequence[Part],
    edges: Sequence[Edge],
    *,
    input: Input,  # noqa: A002
    outputs: Sequence[OutputSpec],
    images: Tensor,
    draws: Sequence[Draw] = (),
    exits: Sequence[ExitSpec] = (),
    policy: ExitPolicy | None = None,
    envelope: bool = True,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a network as a bundle, after its files, loaded back, have passed the parity gate.

    All is written to a folder beside the target that takes the target's name at the very end, so that whatever goes
    wrong, nothing half-written stays and a bundle that was there before is untouched.

    Args:
        directory: The folder to write; its parents are made.
        parts: The partitions; of two that may run in either order, the one listed first runs first.
        edges: What passes between them.
        input: What the network takes.
        outputs: What it is for.
        images: A sample batch as ``input`` makes it, (B, …), at least 3 samples; it is kept in the bundle, in the files
            of its entry, with the outputs expected of it. Real images show what made-up ones may not.
        draws: Inputs of partitions that their placements draw anew for each sample, such as ``layer2.noise``; in the
            gate and in self-tests they are always the same.
        exits: In the order in which they are reached, the network's own classifier last; empty where there are no early
            ones. Their logits are the outputs ``NAME/logits`` of their partitions, ``logits`` of the last.
        policy: Who decides at the exits; ``None``: all samples go on to the end.
        envelope: Put an :class:`~cleave.deployment.Envelope` of 12 bytes in front of every payload, by which a reader
            knows whose it is; False where every byte counts.
        config: The resolved configuration, plain JSON values. Of absolute paths in it the last part alone is kept: a
            bundle goes to others, who need not know the folders of the machine that wrote it.
        metrics: What was measured of the network, plain JSON values: accuracy, payload bytes per sample, … Paths
            likewise.
        overwrite: Replace a bundle that stands there; a folder with any file that no export wrote is never replaced.

    Returns:
        The bundle, loaded from ``directory``; its ``manifest.parity`` holds what the gate measured.

    Raises:
        BundleError: An argument does not fit the others, the folder exists or cannot be written, or a module cannot
            be traced.
        ParityError: A module steers by its input's values, or a loaded partition differs from its module.
    """
    directory = Path(directory)
    if not isinstance(images, Tensor):
        raise BundleError(f"images must be a tensor, got {type(images).__name__}")
    route = check_parts(parts, edges, input=input, outputs=outputs, draws=draws, exits=exits, policy=policy)
    if images.ndim != 1 + len(input.shape) or len(images) < MIN_SAMPLES:
        raise BundleError(
            f"{input.name} must be a batch of at least {MIN_SAMPLES}, (B, {', '.join(map(str, input.shape))}), "
            f"got shape {tuple(images.shape)}"
        )
    images = images.detach().cpu().contiguous()
    TensorSpec(input.name, input.dtype, (-1, *input.shape)).check(images, "the sample batch")
    with new_folder(directory, overwrite) as folder:
        modules = {part.name: _copied(part) for part in parts}
        writers = {place: Writer(route, place, folder, parts, modules, outputs) for place in route.placements}
        walk_all(writers, route, images)
        specs = {name: spec for writer in writers.values() for name, spec in writer.specs.items()}
        manifest = Manifest(
            input=input,
            outputs=tuple(outputs),
            partitions=tuple(specs[part.name] for part in parts),
            edges=tuple(edges),
            samples={place: writer.write_sample() for place, writer in writers.items()},
            draws=tuple(draws),
            exits=tuple(exits),
            policy=policy,
            envelope=envelope,
            metrics=without_paths(dict(metrics or {})),
            config=without_paths(dict(config or {})),
            versions=_versions(),
        )
        write_manifest(folder, manifest)
        parity = parity_gate(load_bundle(folder, warm_up=False), modules, images)
        write_manifest(folder, dataclasses.replace(manifest, parity=parity))
    return load_bundle(directory)


def check_parts(
    parts: Sequence[Part],
    edges: Sequence[Edge],
    *,
    input: Input,  # noqa: A002
    outputs: Sequence[OutputSpec],
    draws: Sequence[Draw] = (),
    exits: Sequence[ExitSpec] = (),
    policy: ExitPolicy | None = None,
) -> Route:
    """Return the route of all of these; :class:`BundleError` unless they fit. Ask before a long computation."""
    names = [check_name(part.name, "the partition") for part in parts]
    if len({name.lower() for name in names}) < len(names):
        raise BundleError(f"each partition needs a name of its own, whatever the case, got {', '.join(names)}")
    for part in parts:
        check_placement(part.name, part.placement)
        if isinstance(part.inputs, str) or isinstance(part.outputs, str):
            raise BundleError(f"inputs and outputs of partition {part.name} are lists of names, got a text")
    places = {part.placement for part in parts}
    if len({place.lower() for place in places}) < len(places):
        raise BundleError(f"each placement needs one spelling, whatever the case, got {', '.join(sorted(places))}")
    if not outputs:
        raise BundleError("outputs is empty: say what the network is for")
    check_exits(exits, policy, [output.name for output in outputs])
    results = route_results(outputs, exits)
    route = Route(tuple(part.signature for part in parts), tuple(edges), input.name, results, tuple(draws))
    check_places(exits, route)
    return route


class Writer(Walk):
    """A walk that traces and saves each part on what the ones before it make of the sample batch.

    Args:
        route: The parts and their edges.
        placement: Whose parts are saved.
        folder: Where to.
        parts: All parts.
        modules: Their modules by name, as they are saved.
        outputs: The network's, whose free sizes stay free.

    Attributes:
        specs: What was saved, by name.
    """

    def __init__(
        self,
        route: Route,
        placement: str,
        folder: Path,
        parts: Sequence[Part],
        modules: Mapping[str, nn.Module],
        outputs: Sequence[OutputSpec],
    ) -> None:
        super().__init__(route, placement)
        self.folder, self.modules = folder, modules
        self.by_name = {part.name: part for part in parts}
        self.outputs = {output.name: output for output in outputs}
        self.specs: dict[str, PartitionSpec] = {}
        self.sample: dict[str, Tensor] = {}

    def run(self, name: str, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Save a part and return its module's outputs."""
        part, module = self.by_name[name], self.modules[name]
        outputs = run_module(module, arguments, part.outputs, name)
        with autocast_off(torch.device("cpu")):
            lines = data_dependent_lines(module, list(first_sample(arguments).values()))
        if lines:
            raise ParityError(
                f"partition {name} steers by the values of its input, which a trace would freeze, in "
                + "; ".join(lines[:3])
            )
        path = self.folder / f"{name}.pt"
        try:
            save_torchscript(module, list(arguments.values()), path)
        # A trace runs the user's own code, on tensors that are not quite tensors; that may raise anything.
        except Exception as error:
            raise BundleError(f"partition {name} cannot be traced: {error}") from error
        self.specs[name] = PartitionSpec(
            name=name,
            placement=part.placement,
            file=FileEntry.of(path),
            format=FORMAT,
            inputs=tuple(TensorSpec.of(key, tensor) for key, tensor in arguments.items()),
            outputs=tuple(self._output(key, tensor) for key, tensor in outputs.items()),
            macs=part.macs,
            params=sum(parameter.numel() for parameter in module.parameters()),
        )
        self.sample |= {key: tensor for key, tensor in arguments.items() if key not in self.route.settings} | outputs
        return outputs

    def send(self, crossing: Crossing, tensors: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        """Return what arrives of a tensor's bytes."""
        return through_bytes(crossing.codec, tensors, f"partition {crossing.producer}")

    def receive(self, crossing: Crossing, payload: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return what arrived."""
        return payload

    def write_sample(self) -> FileEntry:
        """Save what came to this placement and what its parts made of it."""
        path = self.folder / f"sample.{self.placement}.safetensors"
        # safetensors refuses tensors that share memory, as a range expanded over the batch does.
        content = safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in self.sample.items()})
        # Not by save_file, whose files their owner alone can read.
        path.write_bytes(content)
        return FileEntry.of(path)

    def _output(self, name: str, tensor: Tensor) -> TensorSpec:
        spec = TensorSpec.of(name, tensor)
        if (output := self.outputs.get(name)) is not None and len(output.shape) == len(spec.shape) - 1:
            free = [isinstance(size, str) for size in (0, *output.shape)]
            spec = dataclasses.replace(
                spec, shape=tuple(-1 if any_size else n for n, any_size in zip(spec.shape, free, strict=True))
            )
        return spec


def _copied(part: Part) -> nn.Module:
    """Return a copy of a part's module on the CPU, in eval mode."""
    try:
        return copy.deepcopy(part.module).cpu().eval().requires_grad_(False)
    except Exception as error:
        raise BundleError(f"the module of partition {part.name} cannot be copied: {error}") from error


def _versions() -> dict[str, str]:
    cleave = "unknown"
    for package in ("cleave-runtime", "cleave"):  # the same room by itself, and with all the others
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            cleave = importlib.metadata.version(package)
    return {"cleave": cleave, "torch": torch.__version__}
