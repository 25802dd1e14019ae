"""Networks that run at one image size alone, and whether they can be built for another."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cleave.architectures.modes import evaluating

if TYPE_CHECKING:
    from cleave.architectures.backbones.factory import Backbone


def needs_size(backbone: Backbone, argument: str, size: Sequence[int], options: Mapping[str, Any]) -> bool:
    """Return whether a backbone must be built anew to run on images of a size.

    Args:
        backbone: The backbone, built for its own size.
        argument: What its constructor calls the image size.
        size: (height, width).
        options: The arguments that the user gave.

    Raises:
        ValueError: It does not run at this size, and its constructor takes none.
    """
    own = (backbone.input.height, backbone.input.width)
    if tuple(size) == own or options.get(argument):
        return False
    problem = failure_at(backbone, size)
    if problem is None:
        return False
    network = type(backbone.network)
    if argument in inspect.signature(network.__init__).parameters:
        return True
    raise ValueError(
        f"{network.__name__} runs at {own[0]}x{own[1]} pixels alone, not at {size[0]}x{size[1]} ({problem}); leave out "
        f"data.image_size, or set it to {own[0]}"
    )


def check_runs(backbone: Backbone, name: str, size: Sequence[int]) -> None:
    """Raise a ValueError unless a backbone that was built for a size runs at it."""
    if problem := failure_at(backbone, size):
        raise ValueError(
            f"{name} was built for {size[0]}x{size[1]} pixels and does not run at them ({problem}); choose another "
            "data.image_size, or leave it out"
        )


def failure_at(backbone: Backbone, size: Sequence[int]) -> str | None:
    """Run a backbone on one black image of a size, and return what goes wrong, or ``None``."""
    with torch.random.fork_rng(devices=[]), evaluating(backbone.network), torch.no_grad():
        try:
            backbone.network(torch.zeros(1, backbone.input.channels, *size))
        except Exception as error:  # a stranger's forward may raise anything
            return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
