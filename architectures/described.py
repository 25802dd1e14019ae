"""Networks from a description in plain containers, as configs and checkpoints hold it: dictionaries with `_target_`."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cleave.architectures.backbones.factory import Backbone
from cleave.architectures.builders import NONE, staged_network
from cleave.architectures.network.staged import StagedNetwork
from cleave.deployment import ImageInput

GROUPS = ("backbone", "split", "bottleneck", "codec", "channel", "exits", "inserts")
"""The groups that describe a network; a checkpoint's are all it takes to build it again."""
Build = Callable[[Mapping[str, Any], str], Any]
"""Builds what a group describes; the second argument is the group's key, for messages."""


def network_from(description: Mapping[str, Any], num_classes: int, image_input: ImageInput) -> StagedNetwork:
    """Build the network that a checkpoint's config describes, with random weights.

    Args:
        description: The resolved config, with the :data:`GROUPS` and maybe ``cuts``, further layers.
        num_classes: Size of the output.
        image_input: What the network takes.

    Raises:
        ValueError: What it describes cannot be built.
    """
    group = {**description["backbone"], "pretrained": False, "weights": None}
    size = (image_input.height, image_input.width)
    backbone = backbone_from(group, num_classes, size, lambda each, key: instantiate(each))
    cuts = list(description.get("cuts") or ())
    arguments = network_arguments(description, lambda group, key: instantiate(group))
    network = staged_network(backbone.network, sample_of(image_input), cuts=cuts, **arguments)
    network.envelope = description["split"].get("envelope", True)
    return network


def backbone_from(
    group: Mapping[str, Any], num_classes: int, image_size: tuple[int, int] | None, build: Build
) -> Backbone:
    """Build the backbone that a group describes, for images of a size, (height, width), where that is known."""
    more: dict[str, Any] = {"num_classes": num_classes}
    if image_size is not None and "image_size" in inspect.signature(located(group["_target_"])).parameters:
        more["image_size"] = image_size
    return build({**group, **more}, "backbone")


def network_arguments(description: Mapping[str, Any], build: Build) -> dict[str, Any]:
    """Return the arguments of :func:`~cleave.architectures.staged_network` that a description gives."""
    split, exits = description["split"], description["exits"]
    channel = description.get("channel") or {}
    linked = split["at"] is not None and channel.get("_target_") is not None
    bare = split["form"] == NONE
    return {
        "split": split["at"],
        "form": split["form"],
        "bottleneck": None if bare else build(_without_at(description["bottleneck"]), "bottleneck"),
        "bottleneck_at": {} if bare else _builders_at(description, "bottleneck", build),
        "codec": build(_without_at(description["codec"]), "codec"),
        "codec_at": _builders_at(description, "codec", build),
        "channel": build(channel, "channel") if linked else None,
        "exits": exits["at"],
        "exits_count": exits["count"],
        "exit_head": build(exits["head"], "exits.head"),
        "cascade": exits["cascade"],
        "ensemble": exits["ensemble"],
        "ensemble_last": exits["ensemble_last"],
        "gradient_equilibrium": exits["gradient_equilibrium"],
        "inserts": {
            layer: [build(each, f"inserts.{layer}") for each in inserts]
            for layer, inserts in (description.get("inserts") or {}).items()
        },
    }


def instantiate(description: Any) -> Any:
    """Build what plain containers describe, innermost first: each dictionary with `_target_`, a dotted name.

    The other entries are the arguments; with `_partial_` what is built is called later. `_args_` are positional, and
    with `_recursive_: false` the arguments stay as they are.

    Raises:
        ValueError: A name leads nowhere.
    """
    if isinstance(description, list | tuple):
        return [instantiate(each) for each in description]
    if not isinstance(description, Mapping):
        return description
    deep = description.get("_recursive_", True) or "_target_" not in description
    entries = {key: instantiate(each) if deep else each for key, each in description.items()}
    if "_target_" not in description:
        return entries
    arguments = {key: each for key, each in entries.items() if key not in _OWN}
    call = functools.partial(located(str(description["_target_"])), *entries.get("_args_", ()), **arguments)
    return call if description.get("_partial_") else call()


_OWN = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def located(name: str) -> Any:
    """Return the object of a dotted name.

    Raises:
        ValueError: It leads nowhere.
    """
    names = name.split(".")
    for length in range(len(names), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:length]))
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{name}.".startswith(f"{error.name}."):
                raise ValueError(f"{name} cannot be imported: {error}") from error
            continue
        try:
            return functools.reduce(getattr, names[length:], found)
        except AttributeError as error:
            raise ValueError(f"{name} cannot be imported: {error}") from error
    raise ValueError(f"{name} cannot be imported: there is no module {names[0]}; is its folder in PYTHONPATH?")


def sample_of(image_input: ImageInput) -> Tensor:
    """Return two images of an input's shape, the same at each call."""
    return torch.randn(2, *image_input.shape, generator=torch.Generator().manual_seed(0))


def _without_at(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "at"}


def _builders_at(description: Mapping[str, Any], name: str, build: Build) -> dict[str, Any]:
    """Build the same group for single layers, with their settings over the group's."""
    own, at = _without_at(description[name]), description[name].get("at") or {}
    return {str(layer): build(_merged(own, settings), f"{name}.at.{layer}") for layer, settings in at.items()}


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(one[key], value) for key, value in other.items() if _nested(one.get(key), value)}
    return {**one, **other, **both}


def _nested(*values: Sequence[Any] | Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)
