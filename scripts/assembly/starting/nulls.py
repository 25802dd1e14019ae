"""A whole group of settings set to null is one sentence, not an error deep inside of what reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).resolve().parents[3] / "conf"
"""Cleave's own configs."""
# Groups that mean something where they are null: nothing is logged, called, delivered otherwise, scheduled.
MAY_BE_NULL = re.compile(
    r"hydra\b.*|steps|method(\.extra_terms)?|noise|channel|choose|training\.scheduler|exits\.policy|(bottleneck|codec)\.at"
    r"|(logger|callbacks|inserts)(\.\w+)?|(device|server)\.power"
)
SHOWN = 5
_CHOICE = re.compile(r"\+?([\w/]+)(?:@[\w.]+)?=null", re.IGNORECASE)


def refuse_null_choices(name: str, words: Sequence[str]) -> None:
    """Refuse ``data=null`` and the like, of which Hydra says no more than that it wants a string.

    Args:
        name: The script's name.
        words: Its command line.

    Raises:
        ValueError: There is one; the message names what can be chosen or set.
    """
    for word in words:
        found = _CHOICE.fullmatch(word)
        folder = CONF / found[1] if found else None
        if folder is None or not folder.is_dir():
            continue
        group = folder.name
        own = OmegaConf.load(CONF / f"{name}.yaml")
        if isinstance(own, DictConfig) and isinstance(own.get(group), DictConfig):
            raise ValueError(_taken_away(word, group, own[group]))
        choices = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"{word} chooses nothing: leave it out, or take one of {choices}")


def refuse_null_groups(cfg: DictConfig) -> None:
    """Refuse overrides such as ``teacher=null`` or ``~teacher``, where ``teacher`` holds settings that are read.

    Args:
        cfg: The config of a running job.

    Raises:
        ValueError: There is one; the message names what to set instead.
    """
    if not HydraConfig.initialized() or not GlobalHydra.instance().is_initialized():
        return  # composed in Python, or by a launcher in another process, whose parent has looked
    job = HydraConfig.get()
    words = list(job.overrides.task)
    for word, override in zip(words, OverridesParser.create().parse_overrides(words), strict=True):
        key = str(override.key_or_group).replace("/", ".")
        emptied = override.is_delete() or (not override.is_sweep_override() and override.value() is None)
        if not emptied or MAY_BE_NULL.fullmatch(key) or OmegaConf.select(cfg, key, default=None) is not None:
            continue
        before = compose(job.job.config_name, [other for other in words if other != word])
        group = OmegaConf.select(before, key, default=None)
        if isinstance(group, DictConfig) and len(group):
            raise ValueError(_taken_away(word, key, group))


def _taken_away(word: str, key: str, group: DictConfig) -> str:
    names = [f"{key}.{name}" for name in map(str, group) if not name.startswith("_")]
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{word} takes away a whole group, which is read: leave it as it is, or set {shown}"
