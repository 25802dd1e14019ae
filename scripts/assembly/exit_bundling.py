"""What a bundle with early exits needs: who decides there, where its partitions run, and what its exits came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig
from torch import nn

from cleave.architectures import MultiExitNetwork, export_parts
from cleave.architectures.exit_partitions import exit_specs
from cleave.deployment import Bundle, Codec, ExitPolicy, ExitSpec, ImageInput, Part, check_parts, read_policy
from cleave.lightning_modules.exits import network_policy
from cleave.reports.terminal import table
from cleave.scripts.assembly.building import plain

PAYLOAD, POLICY = "test/payload_bytes", "test/policy"


class Exits(NamedTuple):
    """How the exits of a network are exported.

    Attributes:
        policy: Who decides there; ``None``: all samples go on to the end.
        placements: Where each partition runs; ``None``: as the network's split says.
    """

    policy: ExitPolicy | None = None
    placements: Sequence[str] | None = None


def chosen_exits(
    network: nn.Module, image_input: ImageInput, config: DictConfig, options: DictConfig | None = None
) -> Exits:
    """Return what the options of ``conf/export.yaml`` and the config a network was trained with say of its exits.

    What cannot be exported is refused here, before any time is spent on training or testing.

    Args:
        network: The network.
        image_input: Its input.
        config: What it was trained with, which holds a policy of its own.
        options: ``policy_file`` and ``placements``; null takes the network's own.

    Raises:
        ValueError: An option is given for a network without exits, or policy or placements do not fit it.
    """
    given = {key: value for key, value in plain(options).items() if value is not None} if options is not None else {}
    if not isinstance(network, MultiExitNetwork):
        if given:
            key, value = next(iter(given.items()))
            raise ValueError(f"exits.{key}={value} has no meaning here: the checkpoint's network has no exits")
        return Exits()
    if "policy_file" in given:
        policy: ExitPolicy | None = read_policy(Path(given["policy_file"]))
    else:
        own = config.method.get("policy")
        settings = None if own is None else plain(own)
        if settings is None and network.ensemble is not None:
            settings = {"kind": "ensemble"}  # none leaves early, but the last exit answers as the network does
        policy = None if settings is None else network_policy(network, settings)
    exits = Exits(policy, given.get("placements"))
    exit_partitions(network, image_input, exits)
    return exits


def exit_partitions(
    network: nn.Module, image_input: ImageInput, exits: Exits, metrics: Mapping[str, float] | None = None
) -> tuple[list[Part], list[Codec], list[ExitSpec]]:
    """Return a network's parts, codecs and exits.

    Raises:
        ValueError: Placements or policy do not fit the network.
    """
    parts, codecs = export_parts(network, image_input, exits.placements)
    specs = []
    if isinstance(network, MultiExitNetwork):
        specs = exit_specs(network, parts, exits.policy, accuracies(network, metrics or {}))
    check_parts(parts, codecs, specs, exits.policy)
    return parts, codecs, specs


def accuracies(network: MultiExitNetwork, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the accuracy of each exit's answers under the policy that they were tested with."""
    found = {name: metrics.get(f"test/acc_exit/{name}") for name in network.exit_names}
    return {name: value for name, value in found.items() if value is not None}


def all_edges(
    network: MultiExitNetwork,
    parts: Sequence[Part],
    codecs: Sequence[Codec],
    specs: Sequence[ExitSpec],
    metrics: Mapping[str, float],
) -> dict[str, float]:
    """Return what was measured with the bytes of every edge between placements, of which testing knows the split's.

    All others send as many bytes of each sample that goes on there.
    """
    found = dict(metrics)
    route, ends = [part.name for part in parts], [*network.names]
    for index, codec in enumerate(codecs):
        if parts[index].placement == parts[index + 1].placement or ends[index] == network.split:
            continue
        found.pop("test/payload_zstd_bytes", None)  # of the split's bytes alone
        sent = 4.0 * math.prod(codec.shape)
        if "test/acc" in metrics:
            found[PAYLOAD] = found.get(PAYLOAD, 0.0) + sent
        shares = [(spec, metrics.get(f"{POLICY}/share/{spec.name}")) for spec in specs]
        going = [share for spec, share in shares if route.index(spec.partition) > index]
        if None not in going:
            known = found.get(f"{POLICY}/payload_bytes", 0.0)
            found[f"{POLICY}/payload_bytes"] = known + sent * sum(share for share in going if share is not None)
    return found


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
