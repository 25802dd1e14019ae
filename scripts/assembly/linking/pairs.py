"""Two networks cut into blocks, from a config."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, open_dict

from cleave.architectures import Blocks, StagedNetwork, cut_blocks
from cleave.architectures.described import sample_of
from cleave.architectures.linking.described import HOST_DEFAULTS
from cleave.architectures.linking.link import HOST, LOCAL
from cleave.datamodules import ImageDataModule
from cleave.lightning_modules.checkpoints.loading import file_sha256
from cleave.scripts.assembly.building import assemble
from cleave.scripts.assembly.idle import defaults
from cleave.scripts.assembly.linking.lending import lend
from cleave.scripts.assembly.networks import link_builder, plain_value


class Pair(NamedTuple):
    """A local network and a host.

    Attributes:
        data: The images.
        network: The local network as a whole.
        local: Its blocks.
        host: The host's; ``None`` where no path leads over one.
        links: What builds a link of two features.
    """

    data: ImageDataModule
    network: StagedNetwork
    local: Blocks
    host: Blocks | None
    links: Any

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Names of the blocks of both."""
        return list(self.local.names), list(self.host.names) if self.host else []


def with_path(cfg: DictConfig, path: Sequence[int | None] | None) -> DictConfig:
    """Return a run's config with a path, and without what is a search's own; no host is left where none runs."""
    found = copy.deepcopy(cfg)
    with open_dict(found):
        found.pop("search", None)
        found.links.path = None if path is None else list(path)
        if path is None or path[1] is None:
            found.host.update(HOST_DEFAULTS)
            found.links.update({key: value for key, value in defaults("links").items() if key.startswith("host_")})
    return found


def cut_pair(cfg: DictConfig) -> Pair:
    """Cut the networks that a config names into blocks.

    Raises:
        CutError: A block is no layer that the network can be cut at.
        ValueError: Paths over a host are asked for without one, or a setting is out of range.
    """
    links = link_builder(cfg)
    parts = assemble(with_path(cfg, None), [])
    if parts.from_scratch:
        raise ValueError(
            "the local network has random weights; give base.ckpt_path=FILE, backbone.weights=FILE or "
            "backbone.pretrained=true"
        )
    sample, blocks = sample_of(parts.data.input), plain_value(cfg.links.local_blocks)
    local = cut_blocks(parts.network.stages[0], sample, blocks, LOCAL, prefix=cfg.links.local_prefix)
    return Pair(parts.data, parts.network, local, _host(cfg), links)


def _host(cfg: DictConfig) -> Blocks | None:
    if not cfg.search.cross:
        given = next((key for key, value in HOST_DEFAULTS.items() if cfg.host[key] != value), None)
        if given is not None:
            raise ValueError(f"host.{given}={cfg.host[given]} has no meaning with search.cross=false; leave one out")
        return None
    if cfg.host.ckpt_path is None and cfg.host.backbone is None:
        raise ValueError(
            "search.cross=true needs a host; give host.ckpt_path=FILE, or say search.cross=false to search for a "
            "skip-connection"
        )
    base = cfg.base.ckpt_path
    lent = lend(with_path(cfg, [0, 0, 0, 1]), None if base is None else file_sha256(base))
    if lent is None:
        return None
    blocks = plain_value(cfg.links.host_blocks)
    return cut_blocks(lent.host.network, lent.host.sample, blocks, HOST, prefix=cfg.links.host_prefix)
