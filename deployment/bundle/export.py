"""Writing a bundle, and refusing to write one that does not compute what the network computes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..codecs.codec import Codec
from ..exits.policy import ExitPolicy
from ..exits.specs import ExitSpec, check_exits
from ..runtime.preprocess import ImageInput
from .data_dependence import data_dependent_lines
from .files import BundleError, FileEntry, check_name
from .gate import first_sample, parity_gate, run_module, through_bytes
from .loading import Bundle, load_bundle
from .manifest import MANIFEST, Manifest, write_manifest
from .parity import ParityError
from .signatures import EXIT_LOGITS, Signature, check_signatures, part_arguments
from .specs import PartitionSpec, TensorSpec
from .torchscript import FORMAT, save_torchscript

SAMPLE = "sample.safetensors"
_SUFFIXES = (".pt", ".safetensors")
MIN_IMAGES = 3


@dataclasses.dataclass(frozen=True)
class Part:
    """One partition to be exported.

    Args:
        name: Its name, unique in the bundle; letters, digits, ``_``, ``.`` and ``-``.
        placement: Where it is to run, a free name: ``device``, ``edge``, ``server``.
        module: Takes its inputs by position and returns a tensor, or a tuple of tensors. Left as it is: a copy on the
            CPU, in eval mode, is exported.
        inputs: Names of the inputs in order: ``images`` for the first part, what the codec before it delivers for
            each other one; then ``levels`` where the codec behind it sends codes; then ``before``, the logits of the
            exit before, where its own exit reads them.
        outputs: Names of the outputs in order: what the codec behind it sends, ``logits`` for the last part; then
            ``exit_logits`` where an early exit stands behind it.
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
    codecs: Sequence[Codec],
    image_input: ImageInput,
    class_names: Sequence[str],
    images: Tensor,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    exits: Sequence[ExitSpec] = (),
    policy: ExitPolicy | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a network as a bundle, after its files, loaded back, have passed the parity gate.

    All is written to a folder beside the target that takes the target's name at the very end, so that whatever goes
    wrong, nothing half-written stays and a bundle that was there before is untouched.

    Args:
        directory: The folder to write; its parents are made.
        parts: The partitions, in the order of the route.
        codecs: How each part's outputs reach the next one; one fewer than there are parts.
        image_input: The network's input.
        class_names: Name of each class, in the order of the logits.
        images: A sample batch as ``image_input`` makes it, uint8 (B, C, H, W), at least 3 images; it is kept in the
            bundle with its expected outputs. Real images show what made-up ones may not.
        config: The resolved configuration, plain JSON values.
        metrics: What was measured of the network, plain JSON values: accuracy, payload bytes per sample, …
        exits: In the order of the route, the network's own classifier last; empty where there are no early ones.
        policy: Who decides at the exits; ``None``: all samples go on to the end.
        overwrite: Replace a bundle that stands there; a folder with any file that no export wrote is never replaced.

    Returns:
        The bundle, loaded from ``directory``; its ``manifest.parity`` holds what the gate measured.

    Raises:
        BundleError: An argument does not fit the others, the folder exists or cannot be written, or a module cannot
            be traced.
        ParityError: A module steers by its input's values, or a loaded partition differs from its module.
    """
    directory = Path(directory)
    check_parts(parts, codecs, exits, policy)
    if images.ndim != 4 or len(images) < MIN_IMAGES:
        raise BundleError(f"images must be at least {MIN_IMAGES}, (B, C, H, W), got shape {tuple(images.shape)}")
    images = images.detach().cpu().contiguous()
    TensorSpec("images", "uint8", (-1, *image_input.shape)).check(images, "the sample batch")
    with _new_folder(directory, overwrite) as folder:
        modules = [copy.deepcopy(part.module).cpu().eval().requires_grad_(False) for part in parts]
        specs, sample = _write_parts(folder, parts, modules, codecs, images)
        manifest = Manifest(
            input=image_input,
            class_names=tuple(class_names),
            partitions=tuple(specs),
            route=tuple(part.name for part in parts),
            codecs=tuple(codecs),
            sample=_write_sample(folder / SAMPLE, sample),
            exits=tuple(exits),
            policy=policy,
            metrics=dict(metrics or {}),
            config=dict(config or {}),
            versions=_versions(),
        )
        write_manifest(folder, manifest)
        parity = parity_gate(load_bundle(folder), modules, images)
        write_manifest(folder, dataclasses.replace(manifest, parity=parity))
    return load_bundle(directory)


def check_target(directory: str | Path, overwrite: bool = False) -> None:
    """Raise :class:`BundleError` unless a bundle can be written to ``directory``; ask before a long computation."""
    with _new_folder(Path(directory), overwrite, keep=False):
        pass


def check_parts(
    parts: Sequence[Part],
    codecs: Sequence[Codec],
    exits: Sequence[ExitSpec] = (),
    policy: ExitPolicy | None = None,
) -> None:
    """Raise :class:`BundleError` unless all of these fit together; ask before a long computation."""
    if not parts:
        raise BundleError("parts is empty: a bundle has at least one partition")
    if len(codecs) != len(parts) - 1:
        raise BundleError(f"{len(parts)} parts need {len(parts) - 1} codecs between them, got {len(codecs)}")
    names = [check_name(part.name, "the partition") for part in parts]
    if len({name.lower() for name in names}) < len(names):
        raise BundleError(f"each partition needs a name of its own, whatever the case, got {', '.join(names)}")
    signatures = [part.signature for part in parts]
    check_signatures(signatures, codecs, check_exits(exits, policy, signatures))


@contextlib.contextmanager
def _new_folder(directory: Path, overwrite: bool, keep: bool = True) -> Iterator[Path]:
    """Yield a folder beside ``directory`` that takes its place if all went well, and is removed otherwise."""
    folder, made = None, []
    try:
        try:
            _check_replaceable(directory, overwrite)
            made = [parent for parent in directory.parents if not parent.exists()]
            directory.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        except OSError as error:
            raise BundleError(f"cannot write to {directory}: {error.strerror}") from error
        yield folder
        if keep:
            _move(folder, directory)
            made = []
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _check_replaceable(directory: Path, overwrite: bool) -> None:
    if files := [parent for parent in directory.parents if parent.exists() and not parent.is_dir()]:
        raise BundleError(f"cannot write to {directory}: {files[0]} is a file")
    if directory.is_symlink():
        raise BundleError(f"{directory} is a symbolic link; name the folder itself")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise BundleError(f"{directory} is a file; a bundle is a folder")
    names = sorted(path.name for path in directory.iterdir())
    ours = (MANIFEST, *(name for name in names if name.endswith(_SUFFIXES))) if MANIFEST in names else ()
    if other := [name for name in names if name not in ours]:
        raise BundleError(f"{directory} holds {other[0]}, which no export wrote; name a new or an empty folder")
    if names and not overwrite:
        raise BundleError(f"{directory} is a bundle already; replace it with overwrite=true, or name another folder")


def _move(folder: Path, directory: Path) -> None:
    """Give ``folder`` the name ``directory``; a bundle that has it is put aside until that has worked."""
    # A temporary folder is private; a bundle is as open as any other folder its owner makes.
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    aside = folder.with_name(folder.name + ".old")
    try:
        if directory.exists():
            directory.rename(aside)
        try:
            folder.rename(directory)
        except OSError:
            if aside.exists():
                aside.rename(directory)
            raise
    except OSError as error:
        raise BundleError(f"cannot write to {directory}: {error.strerror}") from error
    shutil.rmtree(aside, ignore_errors=True)


def _write_parts(
    folder: Path, parts: Sequence[Part], modules: Sequence[nn.Module], codecs: Sequence[Codec], images: Tensor
) -> tuple[list[PartitionSpec], dict[str, Tensor]]:
    """Trace and save each part on what the ones before it make of the images; return entries and sample tensors."""
    specs, sample = [], {"images": images}
    received: dict[str, Tensor] = {"images": images}
    before: Tensor | None = None
    for index, (part, module) in enumerate(zip(parts, modules, strict=True)):
        codec = codecs[index] if index < len(codecs) else None
        arguments = part_arguments(part.inputs, received, codec, before)
        outputs = run_module(module, arguments, part.outputs, part.name)
        if lines := data_dependent_lines(module, list(first_sample(arguments).values())):
            raise ParityError(
                f"partition {part.name} steers by the values of its input, which a trace would freeze, in "
                + "; ".join(lines[:3])
            )
        path = folder / f"{part.name}.pt"
        try:
            save_torchscript(module, list(arguments.values()), path)
        except RuntimeError as error:
            raise BundleError(f"partition {part.name} cannot be traced: {error}") from error
        specs.append(
            PartitionSpec(
                name=part.name,
                placement=part.placement,
                file=FileEntry.of(path),
                format=FORMAT,
                inputs=tuple(TensorSpec.of(name, tensor) for name, tensor in arguments.items()),
                outputs=tuple(TensorSpec.of(name, tensor) for name, tensor in outputs.items()),
                macs=part.macs,
                params=sum(parameter.numel() for parameter in module.parameters()),
            )
        )
        sample |= {f"{part.name}.{name}": tensor for name, tensor in outputs.items()}
        received = through_bytes(codec, outputs, f"partition {part.name}") if codec else {}
        before = outputs.get(EXIT_LOGITS, before)
        if codec and not codec.lossless:
            sample |= {f"{part.name}.delivered.{name}": received[name] for name in codec.sends}
    return specs, sample


def _write_sample(path: Path, sample: dict[str, Tensor]) -> FileEntry:
    # safetensors refuses tensors that share memory, as a range expanded over the batch does.
    safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in sample.items()}, path)
    return FileEntry.of(path)


def _versions() -> dict[str, str]:
    try:
        cleave = importlib.metadata.version("cleave")
    except importlib.metadata.PackageNotFoundError:
        cleave = "unknown"
    return {"cleave": cleave, "torch": torch.__version__}
