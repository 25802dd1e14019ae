"""The stages of a run: one, or those of a recipe, each with its own objective, trainer and checkpoints."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict

from cleave.architectures.naming import did_you_mean
from cleave.lightning_modules.callbacks.metadata import KEY
from cleave.reports.rates.measured import in_words
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.terminal import USER_ERRORS, unwrapped

NAME = re.compile(r"\w[\w-]*")
KNOWN = ("method", "trainer")


class Stage(NamedTuple):
    """One fit of a run.

    Attributes:
        name: Its name in the recipe, ``None`` where the run is no recipe.
        config: The resolved config, with the stage's own settings in place.
        ckpt_path: Checkpoint to resume it from.
    """

    name: str | None
    config: DictConfig
    ckpt_path: str | None

    @property
    def method(self) -> str:
        """The method in words: ``Head distillation``."""
        return in_words(self.config.method._target_)

    @property
    def number(self) -> int:
        """Its place among the stages of the recipe, from 1."""
        return 1 if self.name is None else list(self.config.stages).index(self.name) + 1

    @contextmanager
    def told(self) -> Iterator[None]:
        """Name the stage in a mistake of its user's."""
        try:
            yield
        except USER_ERRORS as error:
            if self.name is None:
                raise
            raise ValueError(f"stages.{self.name}: {unwrapped(error)}") from error


def stages(cfg: DictConfig, checkpoint: Mapping[str, Any] | None) -> list[Stage]:
    """Return the stages that a run goes through, those before the checkpoint to resume from left out.

    With ``train=false`` nothing but what the checkpoint is of, or else the last stage, remains to be tested.

    Args:
        cfg: The run's config.
        checkpoint: What ``cfg.ckpt_path`` holds.

    Raises:
        ValueError: A recipe has no stage, a stage's name or setting is unknown, or the checkpoint is of another method
            or recipe.
    """
    if cfg.get("stages") is None:
        if "_target_" not in cfg.method:
            raise ValueError("method has no _target_; choose method=head_distillation, experiment=bottlefit or another")
        found = [Stage(None, OmegaConf.create(plain(cfg)), cfg.ckpt_path)]
    elif not isinstance(cfg.stages, DictConfig) or not cfg.stages:
        raise ValueError(
            f"stages={cfg.stages} names no stage; use a recipe such as experiment=bottlefit, or add one or more by "
            "+objective@stages.NAME.method=knowledge_distillation"
        )
    else:
        found = [Stage(name, stage_config(cfg, name), None) for name in map(str, cfg.stages)]
    if checkpoint is None:
        return found if cfg.train else found[-1:]
    rest = found[_place(found, checkpoint[KEY]["config"], cfg.ckpt_path) :]
    rest[0] = rest[0]._replace(ckpt_path=cfg.ckpt_path)
    return rest if cfg.train else rest[:1]


def _place(found: list[Stage], saved: Mapping[str, Any], path: str) -> int:
    """Return which of the stages a checkpoint is of."""
    names = [stage.name for stage in found]
    name, theirs = saved.get("stage"), list(saved.get("stages") or [])
    here = f"this run is the recipe {', '.join(map(str, names))}" if names[0] else "this run is no recipe"
    if name not in names or (name and theirs[: theirs.index(name) + 1] != names[: names.index(name) + 1]):
        there = f"stage {name!r} of the recipe {', '.join(theirs)}" if name else "a run without stages"
        raise ValueError(f"the checkpoint {path} is of {there}, but {here}; resume with what it was made by")
    place = names.index(name)
    ours, other = found[place].config.method._target_, saved["method"]["_target_"]
    if ours != other:
        at = f"stages.{name}.method" if name else "method"
        raise ValueError(f"the checkpoint {path} was made by {at}._target_={other}, but here it is {ours}")
    return place


def stage_config(cfg: DictConfig, name: str) -> DictConfig:
    """Return the resolved config of one stage: its ``method`` and ``trainer`` over the run's."""
    if not NAME.fullmatch(name):
        raise ValueError(f"stages.{name}: a stage's name is made of letters, digits, _ and -, as its folder is")
    cfg = copy.deepcopy(cfg)
    settings = cfg.stages[name] if isinstance(cfg.stages[name], DictConfig) else {}
    for key in settings:
        if key not in KNOWN:
            raise ValueError(
                f"stages.{name}.{key} has no meaning: a stage has {' and '.join(KNOWN)}, such as "
                f"stages.{name}.trainer.max_epochs." + did_you_mean(str(key), KNOWN)
            )
    if "_target_" not in (settings.get("method") or {}):
        raise ValueError(
            f"stages.{name}.method has no _target_: name an objective, such as "
            f"+objective@stages.{name}.method=knowledge_distillation"
        )
    with open_dict(cfg):
        cfg.paths.checkpoints = str(Path(cfg.paths.checkpoints) / name)
        for key in KNOWN:
            if settings.get(key) is not None:
                # Before interpolations are resolved: callbacks watch what the stage's method says.
                cfg[key] = OmegaConf.merge(cfg[key], settings[key])
        config = OmegaConf.create(plain(cfg))
        config.stage = name
        config.stages = {str(n): in_words(OmegaConf.select(cfg, f"stages.{n}.method._target_")) for n in cfg.stages}
    return config
