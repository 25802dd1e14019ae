"""The host that a run asks for: from its checkpoint or from a backbone with weights, and what is written down of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from omegaconf import DictConfig, open_dict

from cleave.reports.terminal import console
from cleave.scripts.assembly.linking.hosts import PRETRAINED, build_host, copied, leads_over_a_host, without_weights
from cleave.scripts.assembly.networks import Host, is_linked, plain_value
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
    config: DictConfig


def lend(cfg: DictConfig, local_sha256: str | None) -> Lent | None:
    """Return the host that a run's config asks for; ``None`` where no path leads over one.

    Args:
        cfg: The config.
        local_sha256: Digest of the local network's checkpoint.

    Raises:
        ValueError: Settings of a host are given where none runs, there is none, or it is the local network.
    """
    host = cfg.host
    if not leads_over_a_host(cfg):
        return None
    if host.weights not in (PRETRAINED, RANDOM):
        raise ValueError(f"host.weights must be {PRETRAINED} or {RANDOM}, got {host.weights!r}")
    if host.ckpt_path is not None and host.backbone is not None:
        raise ValueError(f"give either host.ckpt_path={host.ckpt_path} or host.backbone, not both")
    if host.ckpt_path is not None:
        return _from_checkpoint(host, local_sha256)
    if host.backbone is None:
        raise ValueError(
            f"links.path={plain_value(cfg.links.path)} leads over a host, but there is none; give host.ckpt_path=FILE, "
            "or +backbone@host.backbone=timm and its name"
        )
    if host.weights == PRETRAINED and local_sha256 is None and _same(cfg.backbone, host.backbone):
        raise ValueError(
            "host.backbone is the backbone itself: local and host are one network; links lead through the blocks of "
            "another one"
        )
    settings = without_weights(host) if host.weights == RANDOM else host
    found, pretrained = build_host(settings)
    if pretrained is None and host.weights == PRETRAINED:
        raise ValueError(
            "the host's blocks would be frozen with random weights; give host.ckpt_path=FILE, "
            "host.backbone.weights=FILE or host.backbone.pretrained=true, or say host.weights=random"
        )
    return Lent(found, _written(host, host.backbone, host.num_classes, found.sample.shape[2:]))


def _from_checkpoint(host: DictConfig, local_sha256: str | None) -> Lent:
    if host.num_classes is not None:
        raise ValueError(f"host.num_classes={host.num_classes} is for host.backbone; a checkpoint knows its classes")
    restored = restore(host.ckpt_path, trusted=host.trust_checkpoint)
    if is_linked(restored.config):
        raise ValueError(
            f"host.ckpt_path={host.ckpt_path} is a path of two networks itself; give the checkpoint of one network"
        )
    if restored.sha256 == local_sha256:
        raise ValueError(
            f"host.ckpt_path={host.ckpt_path} and base.ckpt_path are one network; links lead through the blocks of "
            "another one"
        )
    classes, source = len(restored.class_names), restored.image_input
    size = (source.height, source.width) if host.image_size is None else host.image_size
    config = _written(host, restored.config.backbone, classes, size)
    found, _ = build_host(without_weights(config))
    if host.weights == PRETRAINED:
        taken = take_over(found.network, restored.network.state_dict())
        check_taken(found.network, restored.network.state_dict(), taken, str(host.ckpt_path), console)
    return Lent(found, config)


def _written(host: DictConfig, backbone: Any, classes: int | None, size: Any) -> DictConfig:
    found = copied(host)
    with open_dict(found):
        found.backbone, found.num_classes = backbone, classes
        found.image_size = list(size) if isinstance(size, tuple) else plain_value(size)
    return found


def _same(first: DictConfig, second: DictConfig) -> bool:
    """Whether two backbones are one: of one name and with the same weights."""
    keys = ("source", "name", "pretrained", "weights", "kwargs", "network")
    has_weights = bool(second.get("pretrained") or second.get("weights"))
    return has_weights and all(plain_value(first.get(key)) == plain_value(second.get(key)) for key in keys)
