"""Trained networks as candidates of a plan: from checkpoints, bundles, run folders and files of results."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cleave.architectures import StagedNetwork
from cleave.architectures.modes import evaluating
from cleave.deployment import ENVELOPE_BYTES, Manifest, read_manifest
from cleave.deployment.bundle.canonical_json import parse
from cleave.deployment.bundle.files import MANIFEST
from cleave.lightning_modules.testing import Bytes
from cleave.planning.candidates import Candidate
from cleave.reports.rates.collect import find, read
from cleave.reports.rates.results import Point, content
from cleave.reports.terminal import say
from cleave.scripts.assembly.restoring import restore, validated

IMAGES = 4  # noise, whose payloads stand for those of images where nothing was tested


def read_candidates(paths: Sequence[str], backbone: str, trusted: bool) -> list[Candidate]:
    """Read trained networks; those of another backbone than the planned one are left out, and said.

    A file that is met twice counts once, and networks of one name get a number.

    Args:
        paths: Checkpoints, bundles, run folders, and files of results as ``compare.py`` takes them.
        backbone: Name of the planned one.
        trusted: Whether checkpoints may name code of the user's own.

    Raises:
        FileNotFoundError: A path does not exist, or a folder holds no results.
        ValueError: A file is damaged, or says too little of the network.
    """
    if isinstance(paths, str | int | float):
        raise ValueError(f"candidates is a list of paths; write candidates=[{paths}]")
    files: dict[Path, Path] = {}
    for path in map(Path, map(str, paths)):
        files |= {file.resolve(): file for file in ([path] if path.suffix == ".ckpt" else find(path))}
    found: list[Candidate] = []
    for file in files.values():
        if file.suffix == ".ckpt":
            found += of_checkpoint(file, backbone, trusted)
        else:
            found += of_bundle(file.parent, backbone) if file.name == MANIFEST else of_results(file, backbone)
    return told_apart(found)


def told_apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates with a number behind each name that one before them has."""
    met: Counter[str] = Counter()
    found = []
    for each in candidates:
        met[each.name] += 1
        found.append(each if met[each.name] == 1 else dataclasses.replace(each, name=f"{each.name} #{met[each.name]}"))
    return found


def _is_of(backbone: str, name: str | None, source: Path) -> bool:
    """Return whether a network is one of the planned backbone, as far as known; say so where it is not."""
    if name in (None, backbone):
        return True
    say(f"{source}: a network of {name} is left out, as {backbone} is planned")
    return False


def _is_path(linked: bool, source: Path) -> bool:
    """Return whether a network is a path through two, and say so."""
    if linked:
        say(f"{source}: a path through two networks is left out, as search_paths.py plans those")
    return linked


def of_checkpoint(path: Path, backbone: str, trusted: bool) -> list[Candidate]:
    """Read a checkpoint: its parts' costs, the bytes that its codecs make, and what its last validation measured."""
    restored = restore(path, trusted=trusted)
    network = restored.network
    if _is_path(any(cost.side for cost in network.costs()), path):
        return []
    if not _is_of(backbone, restored.config.backbone.get("name"), path):
        return []
    if network.exits:
        say(f"{path}: a checkpoint does not know who leaves at its exits, so that all go to the end; its bundle does")
    accuracy = validated(path).get("val/acc")
    device, server = device_and_server_macs(network)
    label = f"{path.parent.parent.name or path.stem}: {' and '.join(network.bottlenecks) or 'all on the device'}"
    payload = payload_of(network)
    measured = None if accuracy is None else float(accuracy)
    return [Candidate(label, device, server, payload, measured, float(payload > 0), source=str(path))]


def device_and_server_macs(network: StagedNetwork) -> tuple[int, int]:
    """Return the multiply-accumulates of a sample before and behind what the first bottleneck sends."""
    first, found, beyond = next(iter(network.bottlenecks), None), [0, 0], False
    for cost in network.costs():
        beyond = beyond or (cost.kind == "decoder" and cost.name == first)
        found[beyond] += cost.macs
    return found[0], found[1]


@torch.no_grad()
def payload_of(network: StagedNetwork) -> float:
    """Return the mean bytes that a network sends of an image, by its own codecs on noise, envelopes included."""
    if not network.bottlenecks:
        return 0.0
    link = Bytes()
    weight = next(network.parameters())
    with evaluating(network), torch.random.fork_rng([]):
        torch.manual_seed(0)
        network.outputs(torch.randn(IMAGES, *network.input_shape, device=weight.device), network.results, link=link)
    bytes_of_all = sum(len(payload) for payload in itertools.chain.from_iterable(link.payloads.values()))
    return bytes_of_all / IMAGES + len(link.payloads) * (ENVELOPE_BYTES if network.envelope else 0)


def of_results(file: Path, backbone: str) -> list[Candidate]:
    """Read the points of a file; of the server nothing is known but that it runs no more than the whole network."""
    points = [Point.from_dict(values, where) for where, values in read(file)]
    if _is_path(file.suffix == ".json" and "path" in parse(content(file)), file):
        return []
    others = {point.backbone for point in points if point.backbone not in (None, backbone)}
    for name in sorted(filter(None, others)):
        say(f"{file}: results of {name} are left out, as {backbone} is planned")
    points = [point for point in points if point.backbone in (None, backbone)]
    # A baseline, such as JPEG, runs no network on the device.
    uncounted = [point for point in points if point.encoder_macs is None and point.kind == "run"]
    for point in uncounted:
        say(f"{file}: {point.method}: {point.label} is left out, as nobody counted its encoder_macs")
    return [
        Candidate(
            f"{point.method}: {point.label}",
            point.encoder_macs or 0,
            None,
            point.payload_bytes,
            point.accuracy,
            source=str(file),
        )
        for point in points
        if point not in uncounted
    ]


def of_bundle(folder: Path, backbone: str) -> list[Candidate]:
    """Read a bundle's manifest: what its partitions cost by placement, and what was tested."""
    manifest = read_manifest(folder)
    if _is_path((manifest.config.get("links") or {}).get("path") is not None, folder):
        return []
    if not _is_of(backbone, (manifest.config.get("backbone") or {}).get("name"), folder):
        return []
    label = folder.resolve().name
    if label == "bundle":  # as every run names its own
        label = f"{folder.resolve().parent.name}/{label}"
    metrics = manifest.metrics
    shares = {each.name: metrics.get(f"test/policy/share/{each.name}") for each in manifest.exits}
    known = {name: float(share) for name, share in shares.items() if share is not None}
    device, server, sent = _bundle_macs(manifest, known, folder)
    payload = metrics.get("test/policy/payload_bytes", metrics.get("test/payload_bytes"))
    if payload is None and sent:
        raise ValueError(f"{folder} was not tested, so that nobody knows what it sends; export it with its test")
    accuracy = metrics.get("test/policy/acc", metrics.get("test/acc"))
    points: Sequence[Mapping[str, Any]] = metrics.get("points") or [
        {"payload_bytes": payload or 0, "accuracy": accuracy}
    ]
    return [
        Candidate(
            f"bundle {label}" + (f": {point['label']}" if point.get("label") else ""),
            device,
            server,
            float(point["payload_bytes"]),
            point.get("accuracy"),
            sent,
            known,
            str(folder),
        )
        for point in points
    ]


def _bundle_macs(manifest: Manifest, shares: Mapping[str, float], folder: Path) -> tuple[float, float, float]:
    if uncounted := [part.name for part in manifest.partitions if part.macs is None]:
        raise ValueError(f"{folder}: nobody counted the MACs of {', '.join(uncounted)}; export the bundle again")
    order = list(manifest.route.order)
    parts = {part.name: part for part in manifest.partitions}
    here = parts[order[0]].placement
    leaving = {each.partition: shares.get(each.name, 0.0) for each in manifest.exits[:-1]}
    left, sent, found = 1.0, 0.0, [0.0, 0.0]
    for name in order:
        away = parts[name].placement != here
        sent = max(sent, left) if away else sent
        found[away] += left * (parts[name].macs or 0)
        left -= leaving.get(name, 0.0)
    return found[0], found[1], sent
