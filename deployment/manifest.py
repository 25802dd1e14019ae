"""The manifest of a bundle: what its files are, in which order they run, and what was measured of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .canonical_json import digest, dump, parse
from .codec import Codec, codec_from_dict
from .files import BundleError, FileEntry, check_name, read_file
from .preprocess import ImageInput
from .torchscript import FORMAT

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
_DTYPES = {"uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A named input or output of a partition.

    Args:
        name: ``images``, ``levels``, ``codes``, ``low``, ``high``, ``z`` or ``logits``, by the route's convention.
        dtype: ``uint8``, ``int32``, ``int64`` or ``float32``.
        shape: With -1 for the batch.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise BundleError(f"the dtype of {self.name} must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < -1 for n in self.shape):
            raise BundleError(f"the shape of {self.name} must be whole numbers, -1 for the batch, got {self.shape}")

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        """Describe a tensor whose first dimension, if it has one, is the batch."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, dtype, tuple(-1 if i == 0 else n for i, n in enumerate(tensor.shape)))

    def check(self, tensor: Tensor, where: str) -> None:
        """Raise :class:`BundleError` unless a tensor has this dtype and shape."""
        fits = tensor.ndim == len(self.shape) and all(
            wanted in (-1, size) for wanted, size in zip(self.shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != _DTYPES[self.dtype]:
            raise BundleError(
                f"{where}: {self.name} must be {self.dtype} {list(self.shape)}, "
                f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )

    @classmethod
    def from_dict(cls, values: Any) -> TensorSpec:
        """Read a spec; :class:`BundleError` if a key or type is wrong."""
        found = typed(values, "a tensor", name=str, dtype=str, shape=list)
        return cls(found["name"], found["dtype"], tuple(found["shape"]))


@dataclasses.dataclass(frozen=True)
class PartitionSpec:
    """One partition: a file that runs in one place.

    Args:
        name: Its name, unique in the bundle.
        placement: Where it runs, a free name: ``device``, ``edge``, ``server``.
        file: Its file.
        format: ``torchscript``.
        inputs: In the order in which it takes them.
        outputs: In the order in which it returns them.
        macs: Multiply-accumulates per sample, or ``None`` where nobody counted.
        params: Number of parameters.
    """

    name: str
    placement: str
    file: FileEntry
    format: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: int | None
    params: int

    def __post_init__(self) -> None:
        check_name(self.name, "the partition")
        if not self.placement:
            raise BundleError(f"partition {self.name} needs a placement")
        if min(self.macs or 0, self.params) < 0:
            raise BundleError(f"partition {self.name} has negative macs={self.macs} or params={self.params}")
        if self.format != FORMAT:
            raise BundleError(f"partition {self.name} has the unknown format {self.format!r}; known is {FORMAT}")
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if repeated := _repeated(names):
                raise BundleError(f"partition {self.name} repeats {', '.join(repeated)} among its {kind}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the file's entry among them at the same level."""
        values = dataclasses.asdict(self)
        file = values.pop("file")
        return {"name": values.pop("name"), "placement": values.pop("placement"), **file, **values}

    @classmethod
    def from_dict(cls, values: Any) -> PartitionSpec:
        """Read a partition; :class:`BundleError` if a key, type or value is wrong."""
        found = typed(
            values,
            "a partition",
            name=str,
            placement=str,
            file=str,
            sha256=str,
            bytes=int,
            format=str,
            inputs=list,
            outputs=list,
            macs=(int, type(None)),
            params=int,
        )
        found["file"] = FileEntry(found["file"], found.pop("sha256"), found.pop("bytes"))
        for key in ("inputs", "outputs"):
            found[key] = tuple(TensorSpec.from_dict(item) for item in found[key])
        return cls(**found)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself.

    Args:
        input: How a picture becomes the first partition's ``images``.
        class_names: Name of each class, in the order of the logits.
        partitions: One entry per partition.
        route: Names of the partitions in the order in which a sample passes them.
        codecs: One per edge of the route, so one fewer than the route is long.
        sample: The file with a sample batch and its expected outputs.
        exits: Early exits on the way; empty where there are none.
        metrics: What was measured before the export: accuracy, payload bytes per sample, …
        parity: What the export's gate measured between the files and the modules they were made from.
        config: The resolved configuration the network was trained with.
        versions: Versions of ``torch`` and ``cleave`` that wrote the bundle.

    Raises:
        BundleError: Two parts of the manifest contradict each other.
    """

    input: ImageInput
    class_names: tuple[str, ...]
    partitions: tuple[PartitionSpec, ...]
    route: tuple[str, ...]
    codecs: tuple[Codec, ...]
    sample: FileEntry
    exits: tuple[dict[str, Any], ...] = ()
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    parity: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [partition.name for partition in self.partitions]
        files = [MANIFEST, self.sample.file, *(partition.file.file for partition in self.partitions)]
        for what, values in (("partition", names), ("file", files), ("step of the route", list(self.route))):
            if repeated := _repeated(values):
                raise BundleError(f"the {what} {', '.join(repeated)} appears twice")
        if not self.route:
            raise BundleError("the route is empty: it names the partitions in their order")
        if unknown := [name for name in self.route if name not in names]:
            raise BundleError(f"the route names unknown partitions {', '.join(unknown)}; known are {', '.join(names)}")
        if unused := [name for name in names if name not in self.route]:
            raise BundleError(f"the partitions {', '.join(unused)} are not on the route {' > '.join(self.route)}")
        if len(self.codecs) != len(self.route) - 1:
            raise BundleError(
                f"a route of {len(self.route)} partitions needs {len(self.route) - 1} codecs, got {len(self.codecs)}"
            )
        if not self.class_names or not all(isinstance(name, str) for name in self.class_names):
            raise BundleError("class_names must be a list of at least one name")
        self._check_edges()

    def partition(self, name: str) -> PartitionSpec:
        """Return the partition of that name; KeyError if there is none."""
        return {partition.name: partition for partition in self.partitions}[name]

    def _check_edges(self) -> None:
        """Check that what one partition emits is what its codec sends, and what it delivers the next one's inputs."""
        for index, name in enumerate(self.route):
            spec = self.partition(name)
            check_signature(name, [s.name for s in spec.inputs], [s.name for s in spec.outputs], self.codecs, index)
            if index == 0 and spec.inputs[0] != (expected := TensorSpec("images", "uint8", (-1, *self.input.shape))):
                raise BundleError(f"the first input of {name} must be {expected}, got {spec.inputs[0]}")
            if index < len(self.codecs) and spec.outputs[0].shape != (-1, *self.codecs[index].shape):
                raise BundleError(
                    f"{name} emits {spec.outputs[0].name} of shape {spec.outputs[0].shape}, "
                    f"its codec sends {self.codecs[index].shape}"
                )
        logits = self.partition(self.route[-1]).outputs[0]
        if logits.shape != (-1, len(self.class_names)):
            raise BundleError(
                f"the logits have shape {logits.shape}, but there are {len(self.class_names)} class names"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with the schema version and the digest over all the rest."""
        values = {
            "schema": SCHEMA,
            "versions": self.versions,
            "input": self.input.to_dict(),
            "class_names": list(self.class_names),
            "route": list(self.route),
            "codecs": [codec.to_dict() for codec in self.codecs],
            "partitions": [partition.to_dict() for partition in self.partitions],
            "exits": list(self.exits),
            "sample": dataclasses.asdict(self.sample),
            "metrics": self.metrics,
            "parity": self.parity,
            "config": self.config,
        }
        return {**values, "digest": digest(values)}

    @classmethod
    def from_dict(cls, values: Any) -> Manifest:
        """Read a manifest and verify its digest.

        Raises:
            BundleError: The schema version, the digest, a key, a type or a value is wrong.
        """
        if not isinstance(values, dict) or values.get("schema") != SCHEMA or isinstance(values["schema"], bool):
            found = values.get("schema") if isinstance(values, dict) else None
            raise BundleError(f"the manifest has schema {found!r}; this version of Cleave reads {SCHEMA}")
        if values.get("digest") != digest({key: value for key, value in values.items() if key != "digest"}):
            raise BundleError("the manifest has changed: its own digest does not match its content")
        lists = dict.fromkeys(("class_names", "route", "codecs", "partitions", "exits"), list)
        objects = dict.fromkeys(("input", "sample", "metrics", "parity", "config", "versions"), dict)
        found = typed(values, "the manifest", schema=int, digest=str, **lists, **objects)
        sample = typed(found["sample"], "sample", file=str, sha256=str, bytes=int)
        try:
            return cls(
                input=ImageInput.from_dict(found["input"]),
                codecs=tuple(codec_from_dict(codec) for codec in found["codecs"]),
                partitions=tuple(PartitionSpec.from_dict(item) for item in found["partitions"]),
                sample=FileEntry(**sample),
                class_names=tuple(_all(found["class_names"], str, "class_names")),
                route=tuple(_all(found["route"], str, "route")),
                exits=tuple(_all(found["exits"], dict, "exits")),
                metrics=found["metrics"],
                parity=found["parity"],
                config=found["config"],
                versions=found["versions"],
            )
        except BundleError:
            raise
        except ValueError as error:
            raise BundleError(f"the manifest is wrong: {error}") from error


def part_inputs(codecs: Sequence[Codec], index: int) -> tuple[str, ...]:
    """Names of the inputs that partition ``index`` of a route takes, in order.

    The first takes ``images``, each other one what the codec before it delivers; then come the settings of the codec
    behind it, ``levels`` for integer codes, named ``next_levels`` where the partition also receives ``levels``.
    """
    received = ("images",) if index == 0 else codecs[index - 1].delivers
    settings = codecs[index].settings if index < len(codecs) else {}
    return (*received, *(f"next_{name}" if name in received else name for name in settings))


def part_arguments(received: Mapping[str, Tensor], codec: Codec | None) -> dict[str, Tensor]:
    """Return what a partition takes: ``images`` or what it received, and the settings of the codec behind it."""
    settings = codec.settings if codec else {}
    return {**received, **{f"next_{name}" if name in received else name: value for name, value in settings.items()}}


def part_outputs(codecs: Sequence[Codec], index: int) -> tuple[str, ...]:
    """Names of the outputs of partition ``index``: what the codec behind it sends, or ``logits`` at the end."""
    return codecs[index].sends if index < len(codecs) else ("logits",)


def check_signature(
    name: str, inputs: Sequence[str], outputs: Sequence[str], codecs: Sequence[Codec], index: int
) -> None:
    """Raise :class:`BundleError` unless a partition's inputs and outputs are those of its place on the route."""
    for what, found, wanted in (
        ("takes", inputs, part_inputs(codecs, index)),
        ("returns", outputs, part_outputs(codecs, index)),
    ):
        if tuple(found) != wanted:
            raise BundleError(
                f"partition {name}, number {index + 1} of the route, {what} ({', '.join(found)}); "
                f"between these codecs it must be ({', '.join(wanted)})"
            )


def read_manifest(directory: str | Path) -> Manifest:
    """Read ``manifest.json`` of a bundle; none of the other files is touched.

    The digest finds damage, not malice: whoever can write the folder can also write a fitting digest. A bundle from
    elsewhere is to be compared with a digest that came by another way.

    Raises:
        BundleError: The folder or the file is missing, too long, not JSON as it was written, changed, of another
            schema version, or contradicts itself.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a folder: a bundle is a folder with a {MANIFEST}")
    content = read_file(directory, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        values = parse(content)
        manifest = Manifest.from_dict(values)
        if dump(values) != content:
            raise BundleError("the manifest has changed: it is not spelled as it was written")
    except ValueError as error:
        raise BundleError(f"{directory / MANIFEST}: {error}") from error
    return manifest


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Write ``manifest.json``.

    Raises:
        BundleError: A value is not JSON (NaN is not), or the file would be too long to be read back.
    """
    try:
        content = dump(manifest.to_dict())
    except (TypeError, ValueError) as error:
        raise BundleError(f"metrics and config must be plain finite JSON values: {error}") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(f"the manifest would have {len(content)} bytes, more than the {MAX_MANIFEST_BYTES} allowed")
    (Path(directory) / MANIFEST).write_bytes(content)


def typed(values: Any, where: str, **types: Any) -> dict[str, Any]:
    """Return ``values`` if it is an object with exactly these keys and types; :class:`BundleError` otherwise."""
    if not isinstance(values, Mapping):
        raise BundleError(f"{where} must be an object, got {type(values).__name__}")
    if missing := types.keys() - values.keys():
        raise BundleError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := values.keys() - types.keys():
        raise BundleError(f"{where} has the unknown keys {', '.join(sorted(unknown))}; known are {', '.join(types)}")
    for key, kind in types.items():
        if not isinstance(values[key], kind) or isinstance(values[key], bool):
            raise BundleError(f"{where}: {key} has the wrong type, {type(values[key]).__name__}")
    return dict(values)


def _all(values: list[Any], kind: type, where: str) -> list[Any]:
    if wrong := [value for value in values if not isinstance(value, kind)]:
        raise BundleError(f"{where} has an entry of the wrong type: {wrong[0]!r}")
    return values


def _repeated(values: Sequence[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})
