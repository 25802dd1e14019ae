"""The network that lends its blocks to a path, as its settings describe it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cleave.architectures import Backbone
from cleave.deployment import ImageInput
from cleave.scripts.assembly.networks import Host, keyed, plain_value, sample_of

PRETRAINED = "pretrained"
_INACTIVE = {"ckpt_path": None, "backbone": None, "num_classes": None, "image_size": None, "weights": PRETRAINED}


def leads_over_a_host(cfg: DictConfig) -> bool:
    """Return whether a config has a path that leads over a host.

    Raises:
        ValueError: A host is given where none runs: there is no path, or it is a skip-connection.
    """
    links, host = cfg.get("links"), cfg.get("host")
    path = None if links is None else plain_value(links.get("path"))
    if isinstance(path, list) and len(path) == 4 and any(block not in (None, "-", "–") for block in path[1:3]):
        return True
    given = next((key for key, usual in _INACTIVE.items() if host is not None and host.get(key, usual) != usual), None)
    if given is not None:
        where = "without links; give links.path" if path is None else f"on links.path={path}, which has no host"
        raise ValueError(f"host.{given}={host[given]} has no meaning {where}")
    return False


def build_host(host: DictConfig) -> tuple[Host, str | None]:
    """Build the host that its settings describe; return where its weights come from as well.

    Raises:
        ValueError: A setting is out of range.
    """
    classes = 1000 if host.num_classes is None else host.num_classes
    with keyed("host", {"num_classes": classes}):
        backbone: Backbone = instantiate(host.backbone, num_classes=classes)
    return Host(backbone.network, sample_of(_sized(backbone.input, host.image_size))), backbone.pretrained


def rebuild_host(config: DictConfig) -> Host | None:
    """Build the host that a checkpoint's config describes, without its file and without weights."""
    return build_host(without_weights(config.host))[0] if leads_over_a_host(config) else None


def without_weights(host: DictConfig) -> DictConfig:
    """Return the settings of a host whose backbone begins with random weights."""
    found = copied(host)
    found.backbone.pretrained, found.backbone.weights = False, None
    return found


def copied(host: DictConfig) -> DictConfig:
    """Return a copy of settings with all interpolations resolved."""
    return cast(DictConfig, OmegaConf.create(OmegaConf.to_container(host, resolve=True)))


def _sized(image_input: ImageInput, size: Any) -> ImageInput:
    if size is None:
        return image_input
    sides = plain_value(size)
    sides = [sides, sides] if type(sides) is int else list(sides) if isinstance(sides, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"host.image_size must be a number of pixels or [rows,columns], got {size!r}")
    return dataclasses.replace(image_input, height=sides[0], width=sides[1], resize=None)
