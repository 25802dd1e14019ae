"""The names of a network's weights: those of the backbone, wherever it is cut."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

_STAGE = re.compile(r"stages\.stage\d+\.")
_INNER_STAGE = re.compile(r"(^|\.)stages\.stage\d+\.")


def public_name(name: str) -> str:
    """Return a weight's name without the stage that it is in, so that no further cut renames it."""
    return _STAGE.sub("", name, count=1) if _STAGE.match(name) else name


def collapse_names(network: nn.Module) -> None:
    """Let a network with a child ``stages`` save and load its weights under their public names."""
    network.register_state_dict_post_hook(_collapse)
    network.register_load_state_dict_pre_hook(_expand)
    network.register_load_state_dict_post_hook(_report)


def _collapse(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for key in list(state):
        if key.startswith(prefix):
            state[prefix + public_name(key[len(prefix) :])] = state.pop(key)


def _expand(module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    own = [f"stages.{name}" for name in module.get_submodule("stages").state_dict()]
    values = {prefix + name: state[key] for name in own if (key := prefix + public_name(name)) in state}
    for name in own:
        state.pop(prefix + public_name(name), None)
    state.update(values)


def _report(module: nn.Module, incompatible: Any) -> None:
    """Name the weights that are missing as users know them."""
    missing = [_INNER_STAGE.sub(r"\1", name, count=1) for name in incompatible.missing_keys]
    incompatible.missing_keys[:] = dict.fromkeys(missing)
