"""The manifest of a bundle: what its files are, how tensors pass between them, and what was measured of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checks import is_whole
from ..exits.policies import policy_from_dict
from ..exits.policy import ExitPolicy
from ..exits.specs import ExitSpec, check_exits, check_places, exit_logits
from ..naming import did_you_mean, listed
from ..runtime.inputs import Input, input_from_dict, input_to_dict
from .canonical_json import digest, dump, parse, typed
from .draws import Draw
from .edges import Edge, repeated
from .files import MANIFEST, BundleError, FileEntry, check_name, read_file
from .limits import MAX_EXITS, MAX_OUTPUTS, MAX_PARTITIONS, at_most, check_depth, check_label
from .route import Route
from .specs import OutputSpec, PartitionSpec, TensorSpec
from .versions import versions_in

SCHEMA = 5
MAX_MANIFEST_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself.

    Args:
        input: What the network takes.
        outputs: What it is for.
        partitions: One entry per partition.
        edges: What passes between them.
        samples: For each placement, the file with its inputs for a sample batch and the outputs expected of it.
        draws: Random inputs that a placement makes for its partitions.
        exits: In the order in which they are reached, the network's own classifier last; empty where there are none.
        policy: Who decides at the exits; ``None``: all samples go on to the end.
        envelope: Whether every payload has an :class:`~cleave.deployment.Envelope` in front.
        metrics: What was measured before the export: accuracy, payload bytes per sample, …
        parity: What the export's gate measured between the files and the modules they were made from.
        config: The resolved configuration the network was trained with.
        versions: Versions of ``torch`` and ``cleave`` that wrote the bundle.

    Raises:
        BundleError: Two parts of the manifest contradict each other.
    """

    input: Input
    outputs: tuple[OutputSpec, ...]
    partitions: tuple[PartitionSpec, ...]
    edges: tuple[Edge, ...]
    samples: dict[str, FileEntry]
    draws: tuple[Draw, ...] = ()
    exits: tuple[ExitSpec, ...] = ()
    policy: ExitPolicy | None = None
    envelope: bool = True
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    parity: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_counts(self)
        entries = [*self.samples.values(), *(partition.file for partition in self.partitions)]
        if twice := repeated([MANIFEST, *(entry.file for entry in entries)]):
            raise BundleError(f"the file {listed(twice)} appears twice")
        check_exits(self.exits, self.policy, [output.name for output in self.outputs])
        check_places(self.exits, self.route)
        if self.samples.keys() != set(self.route.placements):
            found = listed(self.samples)
            raise BundleError(f"each placement, {listed(self.route.placements)}, has one sample file, got {found}")
        self._check_tensors()

    @functools.cached_property
    def digest(self) -> str:
        """What the file says of itself if this was read from one, else what it would: 64 hexadecimal digits."""
        return digest(self._values())

    @functools.cached_property
    def route(self) -> Route:
        """The partitions and their edges as a graph."""
        results = route_results(self.outputs, self.exits)
        return Route(tuple(p.signature for p in self.partitions), self.edges, self.input.name, results, self.draws)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, of the first output that has classes."""
        return next((output.class_names for output in self.outputs if output.class_names), ())

    @property
    def exit_placements(self) -> tuple[str, ...]:
        """Where each exit runs."""
        return tuple(self.partition(item.partition).placement for item in self.exits)

    def partition(self, name: str) -> PartitionSpec:
        """Return the partition of that name; KeyError if there is none."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, PartitionSpec]:
        return {partition.name: partition for partition in self.partitions}

    def at(self, placement: str) -> list[PartitionSpec]:
        """Return the partitions of a placement in the order in which they run.

        Raises:
            BundleError: There is no such placement.
        """
        known = self.route.placements
        if placement not in known:
            near = did_you_mean(placement, known)
            raise BundleError(f"this bundle has no placement {placement!r}; it has {listed(known)}.{near}")
        return [self.partition(name) for name in self.route.order if self.partition(name).placement == placement]

    def sample_specs(self, placement: str) -> dict[str, TensorSpec]:
        """Return what a placement's sample file holds: what comes to it, and all that its partitions emit."""
        specs = self.at(placement)
        found = {item.name: item for spec in specs for item in spec.inputs if item.name not in self.route.settings}
        return found | {item.name: item for spec in specs for item in spec.outputs}

    def _check_tensors(self) -> None:
        """Check that dtypes and shapes are the same on both sides of everything."""
        emitted = {item.name: item for spec in self.partitions for item in spec.outputs}
        for item in emitted.values():
            if item.shape[:1] != (-1,):
                raise BundleError(
                    f"the shape of {item.name} must begin with -1, the batch, got {list(item.shape)}: a partition runs "
                    "with any number of samples"
                )
        wanted = TensorSpec(self.input.name, self.input.dtype, (-1, *self.input.shape))
        known = {**emitted, wanted.name: wanted}
        known |= {name: TensorSpec.of(name, value) for name, value in self.route.settings.items()}
        known |= {draw.name: TensorSpec(draw.name, "float32", (-1, *draw.shape)) for draw in self.draws}
        for spec in self.partitions:
            for item in spec.inputs:
                if item != known[item.name]:
                    raise BundleError(f"the input {item.name} of {spec.name} must be {known[item.name]}, got {item}")
        for edge in self.edges:
            for transfer in edge.transfers:
                first = emitted[next(iter(transfer.sent.values()))]
                if transfer.codec is not None and transfer.codec.levels and "int" not in first.dtype:
                    raise BundleError(f"{edge.producer} emits {first.name} of dtype {first.dtype}, but codes are int32")
                if transfer.codec is not None and first.shape != (-1, *transfer.codec.shape):
                    raise BundleError(
                        f"{edge.producer} emits {first.name} of shape {first.shape}, "
                        f"its codec sends {transfer.codec.shape}"
                    )
        for output in self.outputs:
            if not output.fits(emitted[output.name]):
                raise BundleError(f"the output {output.name} is {emitted[output.name]}, but must be {output}")
        if self.exits:
            for name in exit_logits(self.exits):
                found = emitted[name]
                if found.shape != (-1, len(self.class_names)) or found.dtype != "float32":
                    raise BundleError(
                        f"the {name} have shape {list(found.shape)} of {found.dtype}, which must be float32 with one "
                        f"number a class, but there are {len(self.class_names)} class names"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with the schema version and the digest over all the rest."""
        values = self._values()
        return {**values, "digest": digest(values)}

    def _values(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "versions": self.versions,
            "input": input_to_dict(self.input),
            "outputs": [output.to_dict() for output in self.outputs],
            "partitions": [partition.to_dict() for partition in self.partitions],
            "route": [edge.to_dict() for edge in self.edges],
            "draws": [draw.to_dict() for draw in self.draws],
            "exits": [item.to_dict() for item in self.exits],
            "policy": None if self.policy is None else self.policy.to_dict(),
            "envelope": self.envelope,
            "samples": {placement: dataclasses.asdict(entry) for placement, entry in self.samples.items()},
            "metrics": self.metrics,
            "parity": self.parity,
            "config": self.config,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Manifest:
        """Read a manifest and verify its digest.

        Raises:
            BundleError: The schema version, the digest, a key, a type or a value is wrong.
        """
        _check_schema(values)
        lists = dict.fromkeys(("outputs", "partitions", "route", "draws", "exits"), list)
        objects = dict.fromkeys(("input", "samples", "metrics", "parity", "config", "versions"), dict)
        policy = {"policy": (dict, type(None))}
        found = typed(values, "the manifest", schema=int, digest=str, envelope=bool, **lists, **objects, **policy)
        try:
            manifest = cls(
                input=input_from_dict(found["input"]),
                outputs=tuple(OutputSpec.from_dict(item) for item in found["outputs"]),
                partitions=tuple(PartitionSpec.from_dict(item) for item in found["partitions"]),
                edges=tuple(Edge.from_dict(item) for item in found["route"]),
                samples={
                    placement: FileEntry(**typed(entry, f"the sample of {placement}", file=str, sha256=str, bytes=int))
                    for placement, entry in found["samples"].items()
                },
                draws=tuple(Draw.from_dict(item) for item in found["draws"]),
                exits=tuple(ExitSpec.from_dict(item) for item in found["exits"]),
                policy=None if found["policy"] is None else policy_from_dict(found["policy"]),
                **{key: found[key] for key in ("envelope", "metrics", "parity", "config", "versions")},
            )
        except BundleError:
            raise
        except ValueError as error:
            raise BundleError(f"the manifest is wrong: {error}") from error
        manifest.__dict__["digest"] = found["digest"]
        return manifest


def route_results(outputs: Sequence[OutputSpec], exits: Sequence[ExitSpec]) -> tuple[str, ...]:
    """Return the names of a network's outputs and of the logits of its exits."""
    return tuple(dict.fromkeys((*(output.name for output in outputs), *exit_logits(exits))))


def _check_counts(manifest: Manifest) -> None:
    """Check what can be told by counting, before anything takes long, and the types of what nothing else looks at."""
    at_most(manifest.outputs, MAX_OUTPUTS, "outputs")
    at_most(manifest.partitions, MAX_PARTITIONS, "partitions")
    at_most(manifest.exits, MAX_EXITS, "exits")
    at_most(manifest.samples, MAX_PARTITIONS, "samples")
    check_label(manifest.input.name, "the input")
    for placement in manifest.samples:
        check_name(placement, "the placement of a sample,")
    if twice := repeated(output.name for output in manifest.outputs):
        raise BundleError(f"the output {listed(twice)} appears twice")
    for name, version in manifest.versions.items():
        check_label(version, f"the version of {name!s:.80}")
    if manifest.parity:
        numbers = dict.fromkeys(("max_difference", "codes_differing"), (int, float))
        batches = typed(manifest.parity, "parity", **numbers, batches=list)["batches"]
        if not all(is_whole(size) and size > 0 for size in batches):
            raise BundleError(f"parity: batches must be positive whole numbers, got {batches!r:.200}")


def _check_schema(values: Any) -> None:
    found = values.get("schema") if isinstance(values, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found != SCHEMA:
        versions = values.get("versions") if isinstance(values, dict) else None
        written = ""
        if isinstance(versions, dict) and versions:
            written = f", written by {' and '.join(f'{name} {version}' for name, version in versions.items())}"
        newer = isinstance(found, int) and found > SCHEMA
        way = "update Cleave, or export it with this version" if newer else "export it again"
        raise BundleError(f"the manifest has schema {found!r}{written}; this version of Cleave reads {SCHEMA}: {way}")
    try:
        found = digest({key: value for key, value in values.items() if key != "digest"})
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest has no digest: {error}") from error
    if values.get("digest") != found:
        raise BundleError("the manifest has changed: its own digest does not match its content")


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
    if not (directory / MANIFEST).exists() and (versions := versions_in(directory)):
        newest = list(versions.values())[-1]
        raise BundleError(f"{directory} holds versions {', '.join(map(str, versions))}; name one of them: {newest}")
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
    check_depth([manifest.metrics, manifest.config], "metrics or config")
    try:
        content = dump(manifest.to_dict())
    except (TypeError, ValueError) as error:
        raise BundleError(f"metrics and config must be plain finite JSON values: {error}") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(f"the manifest would have {len(content)} bytes, more than the {MAX_MANIFEST_BYTES} allowed")
    (Path(directory) / MANIFEST).write_bytes(content)
