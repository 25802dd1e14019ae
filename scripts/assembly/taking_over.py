"""Weights of a base that a new network takes over, and the word on those it does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from rich.console import Console
from torch import Tensor, nn

_WIDTH = re.compile(r"\.sets\.\d+\.")
_INSERTS = ("at:", "ensemble.", "branches.")


def take_over(module: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Copy all weights of the same name and shape into a module; return their names."""
    own = module.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    with torch.no_grad():
        module.load_state_dict(own | fitting)
    return set(fitting)


def check_taken(
    network: nn.Module,
    state: Mapping[str, Tensor],
    before: Iterable[str],
    path: str,
    console: Console,
    role: str = "base",
) -> None:
    """Copy what is left to copy into a network, say what is new and what is dropped, and refuse a backbone with holes.

    Args:
        network: The new network.
        state: The base's weights.
        before: Names of the backbone's weights that were copied before the network was cut from it.
        path: The base's file, for messages.
        console: Where to say what was not taken over.
        role: What the file is to the run.

    Raises:
        ValueError: The base lacks a weight of the backbone, or has it in another shape.
    """
    taken = take_over(network, state) | set(before)
    # A BatchNorm of several widths begins with that of the backbone for each of them.
    missing = [key for key in network.state_dict() if key not in taken and _WIDTH.sub(".", key) not in taken]
    if holes := [key for key in missing if not key.startswith(_INSERTS)]:
        own = network.state_dict()
        words = [f"{key} {tuple(own[key].shape)}" for key in holes[:5]]
        raise ValueError(
            f"the {role} {path} is of another architecture: it lacks {len(holes)} weights of the backbone, such as "
            f"{', '.join(words)}; give the checkpoint of the same backbone"
        )
    whole = set(network.state_dict()) | {_WIDTH.sub(".", key) for key in network.state_dict()}
    dropped = [key for key in state if key not in whole and key not in taken]
    for what, keys in ((f"new, not in the {role}", missing), (f"left out of the {role}", dropped)):
        if keys:
            console.print(f"{what}: {', '.join(_parts(keys))}", soft_wrap=True, highlight=False)


def _parts(keys: Iterable[str]) -> list[str]:
    """Return the modules that weights belong to, no deeper than an insert's own parts."""
    return list(dict.fromkeys(".".join(key.split(".")[: 3 if key.startswith("at:") else 1]) for key in keys))
