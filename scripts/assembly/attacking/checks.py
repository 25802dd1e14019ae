"""Checks that the settings of all attacks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cleave.scripts.assembly.exits_settings import one_of


def one_source(settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint or a bundle is attacked, and not both."""
    if (settings["ckpt_path"] is None) == (settings["bundle"] is None):
        raise ValueError(
            f"give one of ckpt_path=FILE and bundle=DIR, got ckpt_path={settings['ckpt_path']} and "
            f"bundle={settings['bundle']}"
        )


def whole(settings: Mapping[str, Any], key: str, least: int = 1, nullable: bool = False) -> None:
    """Raise ValueError where a setting is no whole number; with ``nullable`` it may be null, which takes all."""
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    if value is None and nullable:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        more = "; null takes all" if nullable else ""
        raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}{more}")


def each(value: Any) -> list[Any]:
    """Return a list; of what stands alone, with that in it."""
    return list(value) if isinstance(value, list) else [value]


def listed(key: str, value: Any, known: Iterable[str], empty: bool = False) -> list[Any]:
    """Return a list of known words, each once.

    Raises:
        ValueError: One is unknown, or there is none and ``empty`` is not set.
    """
    found = list(dict.fromkeys([] if value is None else each(value)))
    for word in found:
        one_of(key, word, list(known))
    if not found and not empty:
        raise ValueError(f"{key} is empty; give some of {', '.join(known)}")
    return found


def releases(value: Any) -> list[int]:
    """Return numbers of releases in order, one release among them; ValueError where one is none."""
    for times in each(value):
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise ValueError(f"attack.releases must be whole numbers of at least 1, got {times!r}")
    return sorted({1, *each(value)})


def check_device(device: Any) -> None:
    """Raise ValueError where a CUDA device is asked for and there is none."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch finds no CUDA device here; use device=cpu")
