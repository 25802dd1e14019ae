"""From a backbone to the network that a config describes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from cleave.architectures import Backbone, Channel, StagedNetwork, staged_network
from cleave.deployment import ImageInput
from cleave.scripts.assembly.terminal import unwrapped

NETWORK = ("backbone", "split", "bottleneck", "codec", "channel", "exits", "inserts")
"""The groups that describe a network; a checkpoint's are all it takes to build it again."""
ARGUMENTS = {
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
    takes_size = "image_size" in inspect.signature(get_object(cfg._target_)).parameters
    sized = {"image_size": image_size} if image_size and takes_size else {}
    return instantiate(cfg, num_classes=num_classes, **sized)


def build_network(
    cfg: DictConfig, backbone: nn.Module, image_input: ImageInput, cuts: Sequence[str] = ()
) -> StagedNetwork:
    """Put what a config describes behind the layers of a backbone; it stays uncut where nothing stands anywhere.

    Args:
        cfg: A run's config.
        backbone: The backbone.
        image_input: What the network takes.
        cuts: Further layers whose features are outputs.

    Raises:
        CutError: A layer is unknown or cannot be cut at.
        ValueError: A setting is out of range; the message names its key.
    """
    split, exits = cfg.split, cfg.exits
    with keyed("split", split), keyed("exits", exits), keyed("channel", cfg.channel or {}):
        network = staged_network(
            backbone,
            sample_of(image_input),
            cuts=cuts,
            split=plain_value(split.at),
            form=split.form,
            bottleneck=None if split.form == "none" else builder(cfg, "bottleneck"),
            bottleneck_at={} if split.form == "none" else builders_at(cfg, "bottleneck"),
            codec=builder(cfg, "codec"),
            codec_at=builders_at(cfg, "codec"),
            channel=build_channel(cfg.channel) if split.at is not None else None,
            exits=plain_value(exits.at),
            exits_count=exits.count,
            exit_head=builder(exits, "head", "exits.head"),
            cascade=exits.cascade,
            ensemble=exits.ensemble,
            ensemble_last=exits.ensemble_last,
            gradient_equilibrium=exits.gradient_equilibrium,
            inserts={layer: instantiate(each) for layer, each in (cfg.get("inserts") or {}).items()},
        )
    choose_envelope(network, split.get("envelope", True))
    return network


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


def builder(cfg: DictConfig, group: str, key: str | None = None) -> Callable[..., Any]:
    """Return what a group builds, called with the rest of its arguments."""
    return _naming_keys(_without_at(cfg[group]), key or group)


def builders_at(cfg: DictConfig, group: str) -> dict[str, Callable[..., Any]]:
    """Return the same for single layers, with their settings over the group's."""
    own = _without_at(cfg[group])
    at = cfg[group].get("at") or {}
    return {
        str(layer): _naming_keys(OmegaConf.merge(own, settings), f"{group}.at.{layer}")
        for layer, settings in at.items()
    }


def plain_value(value: Any) -> Any:
    """Return a config value as plain Python."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def sample_of(image_input: ImageInput) -> Tensor:
    """Return two images of an input's shape, the same at each call."""
    return torch.randn(2, *image_input.shape, generator=torch.Generator().manual_seed(0))


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


def _without_at(group: DictConfig) -> DictConfig:
    return OmegaConf.create({key: value for key, value in group.items() if key != "at"})


def _naming_keys(group: Any, key: str) -> Callable[..., Any]:
    build = instantiate(group, _convert_="all")

    @functools.wraps(getattr(build, "func", build))
    def call(*args: Any, **kwargs: Any) -> Any:
        with keyed(key, group):
            return build(*args, **kwargs)

    return call
