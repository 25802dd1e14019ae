"""A path through two networks, and the host that it leads over, from their description in plain containers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from cleave.architectures.linking.path import is_no_block
from cleave.deployment import ImageInput

PRETRAINED = "pretrained"
HOST_DEFAULTS = {"ckpt_path": None, "backbone": None, "num_classes": None, "image_size": None, "weights": PRETRAINED}
"""The settings of a host where there is none."""
USED, NOT_USED = "used", "none"
# Keys of `links` that say the path; the others are those of each link.
_PATH = ("path", "local_blocks", "host_blocks", "local_prefix", "host_prefix", "host", "placements")


class Host(NamedTuple):
    """The network that lends its blocks to a path.

    Attributes:
        network: The network.
        sample: Images of the size that it is cut at.
    """

    network: nn.Module
    sample: Tensor


def is_linked(description: Mapping[str, Any]) -> bool:
    """Whether a description has a path through two networks, or past some of its own blocks."""
    return (description.get("links") or {}).get("path") is not None


def leads_over_a_host(description: Mapping[str, Any]) -> bool:
    """Return whether a description has a path that leads over a host.

    Raises:
        ValueError: A host is given where none runs: there is no path, or it is a skip-connection.
    """
    path = (description.get("links") or {}).get("path")
    if crosses(path):
        return True
    host = description.get("host") or {}
    given = next((key for key, usual in HOST_DEFAULTS.items() if host.get(key, usual) != usual), None)
    if given is not None:
        where = "without links; give links.path" if path is None else f"on links.path={path}, which has no host"
        raise ValueError(f"host.{given}={host[given]} has no meaning {where}")
    return False


def crosses(path: Any) -> bool:
    """Whether a path as a config says it leads over a host; one that no path can be is refused where it is built."""
    return isinstance(path, list) and len(path) == 4 and not all(map(is_no_block, path[1:3]))


def path_arguments(links: Mapping[str, Any], build: Callable[[Mapping[str, Any], str], Any]) -> dict[str, Any]:
    """Return the arguments of :func:`~cleave.architectures.linked_network` that the group ``links`` gives.

    Raises:
        ValueError: ``links.host`` is neither ``used`` nor ``none``.
    """
    if links["host"] not in (USED, NOT_USED):
        raise ValueError(f"links.host must be {USED} or {NOT_USED}, got {links['host']!r}")
    return {
        "blocks": [links["local_blocks"], links["host_blocks"]],
        "path": links["path"],
        "links": build({key: value for key, value in links.items() if key not in _PATH}, "links"),
        "use_host": links["host"] == USED,
        "prefix": [links["local_prefix"], links["host_prefix"]],
    }


def host_size(size: Any) -> tuple[int, int] | None:
    """Return ``host.image_size`` as (height, width); ``None`` where it is left to the network.

    Raises:
        ValueError: It is neither a number of pixels nor two of them.
    """
    if size is None:
        return None
    sides = [size, size] if type(size) is int else list(size) if isinstance(size, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"host.image_size must be a number of pixels or [rows,columns], got {size!r}")
    return sides[0], sides[1]


def sized(image_input: ImageInput, size: tuple[int, int] | None) -> ImageInput:
    """Return an input for images of another size; ``None`` leaves it as it is."""
    return image_input if size is None else dataclasses.replace(image_input, height=size[0], width=size[1], resize=None)
