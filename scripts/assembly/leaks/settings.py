"""Checks that the settings of both attacks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def whole(settings: Mapping[str, Any], key: str, least: int = 1, nullable: bool = False) -> Any:
    """Return a setting that is a whole number.

    Raises:
        ValueError: It is none.
    """
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    if value is None and nullable:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        more = "; null takes all" if nullable else ""
        raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}{more}")
    return value


def check_device(device: Any) -> None:
    """Raise ValueError where a CUDA device is asked for and there is none."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch finds no CUDA device here; use device=cpu")
