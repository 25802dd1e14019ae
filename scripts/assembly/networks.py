"""From a backbone to the network that a config describes."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cleave.architectures import Backbone, Channel, StagedNetwork
from cleave.architectures.described import GROUPS, backbone_from, furnished
from cleave.architectures.linking.described import Host, is_linked, path_arguments
from cleave.deployment import ImageInput
from cleave.scripts.assembly.starting.terminal import unwrapped

ARGUMENTS = {
    "use_host": "links.host",
    "exits_count": "exits.count",
    "exit_head": "exits.head",
    "bottleneck_at": "bottleneck.at",
    "codec_at": "codec.at",
    "exits": "exits.at",
    "split": "split.at",
    "form": "split.form",
    "ensemble": "exits.ensemble",
    "ensemble_last": "exits.ensemble_last",
    "cascade": "exits.cascade",
}
"""Keys of a config by the arguments of :func:`~cleave.architectures.staged_network` that are called otherwise."""


def build_backbone(cfg: DictConfig, num_classes: int, image_size: tuple[int, int] | None) -> Backbone:
    """Build the backbone that a config describes, for images of a size if that is known."""
    return backbone_from(plain_value(cfg), num_classes, image_size, lambda group, key: instantiate(group))


def build_network(
    cfg: DictConfig, backbone: nn.Module, image_input: ImageInput, cuts: Sequence[str] = (), host: Host | None = None
) -> StagedNetwork:
    """Put what a config describes behind the layers of a backbone; it stays uncut where nothing stands anywhere.

    Args:
        cfg: A run's config.
        backbone: The backbone; the local network, where there is a path.
        image_input: What the network takes.
        cuts: Further layers whose features are outputs.
        host: The network whose blocks a path leads through.

    Raises:
        CutError: A layer is unknown or cannot be cut at.
        ValueError: A setting is out of range; the message names its key.
    """
    groups = {group: cfg[group] or {} for group in ("split", "exits", "noise", "channel")}
    groups |= {"links": cfg.links} if is_linked(cfg) else {}
    described = {group: plain_value(cfg.get(group)) for group in GROUPS}
    with contextlib.ExitStack() as keys:
        for group, settings in groups.items():
            keys.enter_context(keyed(group, settings))
        network = furnished(described, backbone, image_input, _built, cuts, host)
    choose_envelope(network, cfg.split.get("envelope", True))
    return network


def link_builder(cfg: DictConfig) -> Any:
    """Return what builds a link of the two features that it joins, as a run's config says.

    Raises:
        ValueError: A setting of links is out of range; the message names its key.
    """
    return path_arguments(plain_value(cfg.links), _built)["links"]


def choose_envelope(network: StagedNetwork, envelope: Any) -> None:
    """Say whether what a network sends has an envelope; ValueError unless that is true or false."""
    if not isinstance(envelope, bool):
        raise ValueError(f"split.envelope must be true or false, got {envelope!r}")
    network.envelope = envelope


def build_channel(cfg: DictConfig | None) -> Channel | None:
    """Build the link that a config names; ``None`` for one that loses nothing."""
    if cfg is None or cfg.get("_target_") is None:
        return None
    with keyed("channel", cfg):
        return instantiate(cfg, _convert_="all")


def plain_value(value: Any) -> Any:
    """Return a config value as plain Python."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


class keyed:  # noqa: N801 used as a verb: `with keyed("codec", cfg):`
    """Put config keys for the names of arguments in the message of a mistake.

    Args:
        key: The group of the config.
        settings: Its settings, whose names are those of the arguments.
    """

    def __init__(self, key: str, settings: Mapping[Any, Any]) -> None:
        self.key, self.names = key, [str(name) for name in settings]

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raise the mistake again under its key."""
        if error is None:
            return
        mistake = unwrapped(error)
        message = str(mistake)
        if not isinstance(mistake, ValueError | TypeError) or mistake.args != (message,):
            return
        if re.split("[= ]", message, maxsplit=1)[0] in self.names:
            message = f"{self.key}.{message}"
        if (message := in_config_words(message)) != str(mistake):
            raise type(mistake)(message) from mistake


def in_config_words(message: str) -> str:
    """Return a message about arguments of a network's builder with the keys by which a config says them."""
    for argument, key in ARGUMENTS.items():
        # Some of them are words of the language, too.
        place = "" if "_" in argument else r"(?==| or exits\.| names | is a )"
        message = re.sub(rf"(?<![\w.'\"])\b{argument}\b{place}", key, message)
    return message


def _built(group: Mapping[str, Any], key: str) -> Any:
    if key == "channel":
        return build_channel(OmegaConf.create(dict(group)))
    if key == "noise":
        with keyed(key, group):
            return instantiate(group)
    if key.startswith("inserts."):
        return instantiate(group)
    return _naming_keys(group, key)


def _naming_keys(group: Any, key: str) -> Callable[..., Any]:
    build = instantiate(group, _convert_="all")

    @functools.wraps(getattr(build, "func", build))
    def call(*args: Any, **kwargs: Any) -> Any:
        with keyed(key, group):
            return build(*args, **kwargs)

    return call
