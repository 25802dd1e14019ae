"""The host that a run asks for: from its checkpoint or from a backbone with weights, and what is written down of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig

from cleave.architectures.described import host_from, sample_of, without_weights
from cleave.architectures.linking.described import PRETRAINED, Host, host_size, is_linked, leads_over_a_host, sized
from cleave.reports.terminal import console
from cleave.scripts.assembly.networks import keyed, plain_value
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.taking_over import check_taken, take_over

RANDOM = "random"


class Lent(NamedTuple):
    """A host, and what a run writes down of it.

    Attributes:
        host: The network.
        config: The group ``host`` with what it takes to build the network again without its file.
    """

    host: Host
    config: dict[str, Any]


def lend(cfg: DictConfig, local_sha256: str | None) -> Lent | None:
    """Return the host that a run's config asks for; ``None`` where no path leads over one.

    Args:
        cfg: The config.
        local_sha256: Digest of the local network's checkpoint.

    Raises:
        ValueError: Settings of a host are given where none runs, there is none, or it is the local network.
    """
    host: dict[str, Any] = plain_value(cfg.host)
    if not leads_over_a_host({"links": plain_value(cfg.links), "host": host}):
        return None
    if host["weights"] not in (PRETRAINED, RANDOM):
        raise ValueError(f"host.weights must be {PRETRAINED} or {RANDOM}, got {host['weights']!r}")
    if host["ckpt_path"] is not None and host["backbone"] is not None:
        raise ValueError(f"give either host.ckpt_path={host['ckpt_path']} or host.backbone, not both")
    if host["ckpt_path"] is not None:
        return _from_checkpoint(host, local_sha256)
    if host["backbone"] is None:
        raise ValueError(
            f"links.path={plain_value(cfg.links.path)} leads over a host, but there is none; give host.ckpt_path=FILE, "
            "or +backbone@host.backbone=timm and its name"
        )
    pretrained = host["weights"] == PRETRAINED
    if pretrained and local_sha256 is None and _same(plain_value(cfg.backbone), host["backbone"]):
        raise ValueError(
            "host.backbone is the backbone itself: local and host are one network; links lead through the blocks of "
            "another one"
        )
    found, origin = _built(host if pretrained else {**host, "backbone": without_weights(host["backbone"])})
    if origin is None and pretrained:
        raise ValueError(
            "the host's blocks would be frozen with random weights; give host.ckpt_path=FILE, "
            "host.backbone.weights=FILE or host.backbone.pretrained=true, or say host.weights=random"
        )
    return Lent(found, {**host, "image_size": list(found.sample.shape[2:])})


def _from_checkpoint(host: dict[str, Any], local_sha256: str | None) -> Lent:
    path = host["ckpt_path"]
    if host["num_classes"] is not None:
        raise ValueError(f"host.num_classes={host['num_classes']} is for host.backbone; a checkpoint knows its classes")
    restored = restore(path, trusted=host["trust_checkpoint"], key="host.trust_checkpoint", further=())
    if is_linked(restored.config):
        raise ValueError(f"host.ckpt_path={path} is a path of two networks itself; give the checkpoint of one network")
    if restored.sha256 == local_sha256:
        raise ValueError(
            f"host.ckpt_path={path} and base.ckpt_path are one network; links lead through the blocks of another one"
        )
    trained_at, backbone = restored.image_input, plain_value(restored.config.backbone)
    config = {**host, "backbone": backbone, "num_classes": len(restored.class_names)}
    untrained = {"backbone": without_weights(backbone), "image_size": [trained_at.height, trained_at.width]}
    network = _built({**config, **untrained})[0].network
    if host["weights"] == PRETRAINED:
        state = restored.network.state_dict()
        check_taken(network, state, take_over(network, state), str(path), console, "host")
    sample = sample_of(sized(trained_at, host_size(host["image_size"])))
    return Lent(Host(network, sample), {**config, "image_size": list(sample.shape[2:])})


def _built(host: Mapping[str, Any]) -> tuple[Host, str | None]:
    with keyed("host", {"num_classes": None}):
        return host_from(host, lambda group, key: instantiate(group))


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two backbones are one: of one name and with the same weights."""
    keys = ("source", "name", "pretrained", "weights", "kwargs", "network")
    has_weights = bool(second.get("pretrained") or second.get("weights"))
    return has_weights and all(first.get(key) == second.get(key) for key in keys)
