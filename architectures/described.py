"""Networks from a description in plain containers, as configs and checkpoints hold it: dictionaries with `_target_`."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures.backbones.factory import Backbone
from cleave.architectures.builders import staged_network
from cleave.architectures.furnishing import NONE
from cleave.architectures.linking.described import Host, host_size, is_linked, leads_over_a_host, path_arguments, sized
from cleave.architectures.linking.linked import linked_network
from cleave.architectures.network.staged import StagedNetwork
from cleave.deployment import ImageInput

GROUPS = ("backbone", "links", "host", "split", "bottleneck", "codec", "noise", "channel", "exits", "inserts")
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
    size = (image_input.height, image_input.width)
    backbone = backbone_from(without_weights(description["backbone"]), num_classes, size, _instantiated)
    host = rebuild_host(description) if leads_over_a_host(description) else None
    cuts = list(description.get("cuts") or ())
    network = furnished(description, backbone.network, image_input, _instantiated, cuts, host)
    network.envelope = description["split"].get("envelope", True)
    return network


def furnished(
    description: Mapping[str, Any],
    backbone: nn.Module,
    image_input: ImageInput,
    build: Build,
    cuts: Sequence[str] = (),
    host: Host | None = None,
) -> StagedNetwork:
    """Put what a description says behind the layers of a backbone, or lead a path through it and a host.

    Args:
        description: The resolved config, with the :data:`GROUPS`.
        backbone: The backbone; the local network, where there is a path.
        image_input: What the network takes.
        build: Builds what a group describes.
        cuts: Further layers whose features are outputs.
        host: The network whose blocks a path leads through.

    Raises:
        CutError: A layer is unknown or cannot be cut at.
        ValueError: A setting is out of range, or the path leads nowhere.
    """
    arguments = network_arguments(description, build)
    sample = sample_of(image_input)
    if not is_linked(description):
        return staged_network(backbone, sample, cuts=cuts, **arguments)
    lent, samples = (None, [sample]) if host is None else (host.network, [sample, host.sample])
    way = path_arguments(description["links"], build)
    return linked_network(backbone, lent, samples, cuts=cuts, **way, **arguments)


def rebuild_host(description: Mapping[str, Any]) -> Host:
    """Build the host of a checkpoint's config, with random weights: neither its file nor others are read."""
    group = description["host"]
    return host_from({**group, "backbone": without_weights(group["backbone"])}, _instantiated)[0]


def host_from(group: Mapping[str, Any], build: Build) -> tuple[Host, str | None]:
    """Build the host that the group ``host`` describes; return where its weights come from as well.

    Raises:
        ValueError: A setting is out of range.
    """
    classes, size = 1000 if group["num_classes"] is None else group["num_classes"], host_size(group["image_size"])
    backbone = backbone_from(group["backbone"], classes, size, build)
    return Host(backbone.network, sample_of(sized(backbone.input, size))), backbone.pretrained


def without_weights(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a backbone that begins with random weights."""
    return {**backbone, "pretrained": False, "weights": None}


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
    sends = split["at"] is not None or is_linked(description)
    on_the_way = {group: description.get(group) or {} for group in ("noise", "channel")}
    bare = split["form"] == NONE
    return {
        "split": split["at"],
        "form": split["form"],
        "bottleneck": None if bare else build(_without_at(description["bottleneck"]), "bottleneck"),
        "bottleneck_at": {} if bare else _builders_at(description, "bottleneck", build),
        "codec": build(_without_at(description["codec"]), "codec"),
        "codec_at": _builders_at(description, "codec", build),
        **{
            group: build(settings, group) if sends and settings.get("_target_") is not None else None
            for group, settings in on_the_way.items()
        },
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


def _instantiated(description: Mapping[str, Any], key: str) -> Any:
    return instantiate(description)


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
