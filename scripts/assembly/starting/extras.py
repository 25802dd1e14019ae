"""What is done around a run because the config's ``extras`` ask for it, before anything is built."""

from __future__ import annotations

import os
import warnings
from typing import Any

from omegaconf import DictConfig, OmegaConf

DEFAULT_TAGS = ("dev",)
KNOWN = ("ignore_warnings", "enforce_tags", "print_config")


def apply_extras(cfg: DictConfig) -> None:
    """Do what ``cfg.extras`` asks for.

    Raises:
        ValueError: ``extras`` has an unknown key or a value that is neither true nor false; or tags are enforced, and
            there are none that say anything of this run.
    """
    extras = cfg.get("extras")
    if extras is None:
        return
    chosen = {key: _checked(str(key), value) for key, value in extras.items()}
    if chosen.get("ignore_warnings"):
        warnings.filterwarnings("ignore")
    if chosen.get("enforce_tags") and tuple(cfg.get("tags") or ()) in ((), DEFAULT_TAGS):
        raise ValueError(
            f"extras.enforce_tags=true, but tags={list(cfg.get('tags') or ())} says nothing of this run; add "
            "'tags=[WORD,…]', or choose an experiment that has some"
        )
    if chosen.get("print_config") and os.environ.get("LOCAL_RANK", "0") == "0":
        from rich.syntax import Syntax

        from cleave.reports.terminal import console

        text = OmegaConf.to_yaml(cfg, resolve=True)
        console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))


def _checked(key: str, value: Any) -> bool:
    if key not in KNOWN:
        raise ValueError(f"extras.{key} has no meaning; there are {', '.join(KNOWN)}")
    if not isinstance(value, bool):
        raise ValueError(f"extras.{key} must be true or false, got {value!r}")
    return value
