"""The manifest of a bundle: what its files are, in which order they run, and what was measured of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..codecs.codec import Codec, codec_from_dict
from ..exits.policies import policy_from_dict
from ..exits.policy import ExitPolicy
from ..exits.specs import ExitSpec, check_exits
from ..runtime.preprocess import ImageInput
from .canonical_json import digest, dump, parse
from .files import BundleError, FileEntry, read_file
from .signatures import BEFORE, EXIT_LOGITS, check_signatures
from .specs import PartitionSpec, TensorSpec, repeated
from .typed_json import all_of, typed

SCHEMA = 2
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20


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
        exits: In the order of the route, the network's own classifier last; empty where there are no early ones.
        policy: Who decides at the exits; ``None``: all samples go on to the end.
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
    exits: tuple[ExitSpec, ...] = ()
    policy: ExitPolicy | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    parity: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [partition.name for partition in self.partitions]
        files = [MANIFEST, self.sample.file, *(partition.file.file for partition in self.partitions)]
        for what, values in (("partition", names), ("file", files), ("step of the route", list(self.route))):
            if twice := repeated(values):
                raise BundleError(f"the {what} {', '.join(twice)} appears twice")
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

    @property
    def placements(self) -> tuple[str, ...]:
        """Where each step of the route runs."""
        return tuple(self.partition(name).placement for name in self.route)

    @property
    def exit_placements(self) -> tuple[str, ...]:
        """Where each exit runs."""
        return tuple(self.partition(item.partition).placement for item in self.exits)

    def _check_edges(self) -> None:
        """Check that what one partition emits is what its codec sends, and what it delivers the next one's inputs."""
        signatures = [self.partition(name).signature for name in self.route]
        check_signatures(signatures, self.codecs, check_exits(self.exits, self.policy, signatures))
        for index, name in enumerate(self.route):
            spec = self.partition(name)
            if index == 0 and spec.inputs[0] != (expected := TensorSpec("images", "uint8", (-1, *self.input.shape))):
                raise BundleError(f"the first input of {name} must be {expected}, got {spec.inputs[0]}")
            if index < len(self.codecs) and spec.outputs[0].shape != (-1, *self.codecs[index].shape):
                raise BundleError(
                    f"{name} emits {spec.outputs[0].name} of shape {spec.outputs[0].shape}, "
                    f"its codec sends {self.codecs[index].shape}"
                )
            for tensor in (*spec.inputs, *spec.outputs):
                if tensor.name in (BEFORE, EXIT_LOGITS, "logits") and tensor.shape != (-1, len(self.class_names)):
                    raise BundleError(
                        f"the {tensor.name} of {name} have shape {tensor.shape}, "
                        f"but there are {len(self.class_names)} class names"
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
            "exits": [item.to_dict() for item in self.exits],
            "policy": None if self.policy is None else self.policy.to_dict(),
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
        policy = {"policy": (dict, type(None))}
        found = typed(values, "the manifest", schema=int, digest=str, **lists, **objects, **policy)
        sample = typed(found["sample"], "sample", file=str, sha256=str, bytes=int)
        try:
            return cls(
                input=ImageInput.from_dict(found["input"]),
                codecs=tuple(codec_from_dict(codec) for codec in found["codecs"]),
                partitions=tuple(PartitionSpec.from_dict(item) for item in found["partitions"]),
                sample=FileEntry(**sample),
                class_names=tuple(all_of(found["class_names"], str, "class_names")),
                route=tuple(all_of(found["route"], str, "route")),
                exits=tuple(ExitSpec.from_dict(item) for item in found["exits"]),
                policy=None if found["policy"] is None else policy_from_dict(found["policy"]),
                metrics=found["metrics"],
                parity=found["parity"],
                config=found["config"],
                versions=found["versions"],
            )
        except BundleError:
            raise
        except ValueError as error:
            raise BundleError(f"the manifest is wrong: {error}") from error


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
