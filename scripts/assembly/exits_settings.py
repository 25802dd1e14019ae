"""The settings of a report on early exits, checked as far as they can be without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from cleave.architectures.naming import did_you_mean
from cleave.deployment import POLICIES
from cleave.scripts.assembly.building import plain


def checked(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings as plain values, lists where one stands alone.

    Raises:
        ValueError: A value is none of those that it may be.
    """
    settings = plain(cfg)
    for key in ("policies", "budgets"):
        listed = settings[key] if isinstance(settings[key], list) else [settings[key]]
        if not listed:
            raise ValueError(f"{key} is empty; give at least one")
        settings[key] = list(dict.fromkeys(listed))
    chosen, placement, timing = (settings[key] for key in ("choose", "placement", "timing"))
    for kind in settings["policies"]:
        one_of("policies", kind, list(POLICIES))
    one_of("scheme", settings["scheme"], ["budget", "budgeted_batch"])
    if not isinstance(settings["costs"], list):
        one_of("costs", settings["costs"], ["macs", "seconds"])
    for key in ("shared", "temperatures", "fit_ensemble"):
        if not isinstance(settings[key], bool):
            raise ValueError(f"{key} must be true or false, got {settings[key]!r}")
    if settings["calibrate_on"] != "val":
        raise ValueError(
            f"calibrate_on must be val, got {settings['calibrate_on']!r}: thresholds chosen on the images that are "
            "reported would flatter, and on the training images the network is surer than it will ever be again"
        )
    above(0, "budgets", *settings["budgets"])
    if isinstance(settings["costs"], list):
        above(0, "costs", *settings["costs"])
    if chosen:
        one_of("choose.policy", chosen["policy"], list(POLICIES))
        if chosen["drop"] is None:
            above(0, "choose.budget", chosen["budget"])
        elif not number(chosen["drop"]) or not 0 <= chosen["drop"] <= 1:
            raise ValueError(f"choose.drop must be from 0 to 1, got {chosen['drop']!r}; one point is 0.01")
    if placement["exits"] is not None:
        above(0, "placement.budget", placement["budget"])
    wholes = {"curve": (settings["curve"], 2), "timing.batch_size": (timing["batch_size"], 1)}
    wholes |= {f"timing.{key}": (timing[key], 0) for key in ("batches", "limit")}
    for key, (value, least) in wholes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}")
    if settings["costs"] == "seconds" and not timing["batches"]:
        raise ValueError("costs=seconds needs timing.batches of at least 1 to measure them on")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={cfg.device}: torch finds no CUDA device here; use device=cpu")
    return settings


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a value that is not known."""
    if value not in known:
        close = did_you_mean(str(value), known)
        raise ValueError(f"{name}: there are {', '.join(known)}, got {value!r}.{close}")


def above(least: float, name: str, *values: Any) -> None:
    """Refuse values that are no numbers above the least."""
    for value in values:
        if not number(value) or not least < value < math.inf:
            raise ValueError(f"{name} must be above {least}, such as 0.5, got {value!r}")


def number(value: Any) -> bool:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)
