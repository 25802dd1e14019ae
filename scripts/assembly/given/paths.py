"""Paths that a user gives: `~` is the home folder, and what a checkpoint keeps does not hang on where it was typed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

DATA = ("data.root", "data.table", "data.dataset.root")
"""Where images lie: a checkpoint keeps it, and is read from other folders."""
# `~` and `~name` where a value begins, also in a list or behind a quotation mark.
_HOME = re.compile(r"(?<=[=\[,:'\" ])~([\w.-]*)(?=/|[,\]'\" ]|$)")


def expanded_override(override: str) -> str:
    """Put the home folder for `~` where a value of an override begins, which Hydra's grammar does not know."""
    if "=" not in override:
        return override  # `~key` drops a key
    key, equals, value = override.partition("=")
    return key + _HOME.sub(lambda found: _expanded(found[0]), equals + value)


def settle(cfg: DictConfig) -> None:
    """Expand `~` in all values of a config, and make the place of the images absolute."""
    for node, key, value in list(_texts(cfg)):
        if value == "~" or re.match(r"~[\w.-]*/", value):
            node[key] = _expanded(value)
    for place in DATA:
        value = OmegaConf.select(cfg, place, throw_on_missing=False)
        if isinstance(value, str) and not Path(value).is_absolute():
            OmegaConf.update(cfg, place, str(Path(value).absolute()))


def _texts(node: Any) -> Iterator[tuple[Any, Any, str]]:
    """Yield the texts of a config as (container, key, value), without resolving what leans on others."""
    keys: list[Any] = list(node.keys() if isinstance(node, DictConfig) else range(len(node)))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, str):
            yield node, key, value
        elif isinstance(value, DictConfig | ListConfig) and not value._is_none():
            yield from _texts(value)


def _expanded(text: str) -> str:
    try:
        return str(Path(text).expanduser())
    except RuntimeError:  # a user whom this machine does not know
        return text
