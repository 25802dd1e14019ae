"""The stages of a run: one, or those of a recipe, each with its own objective, trainer and checkpoints."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict

from architectures.naming import did_you_mean
from lightning_modules.callbacks.metadata import KEY
from scripts.assembly import plain, read_checkpoint

NAME = re.compile(r"\w[\w-]*")


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
        target = str(self.config.method._target_).rpartition(".")[2]
        return re.sub(r"(?<!^)(?=[A-Z])", " ", target).capitalize()


def stages(cfg: DictConfig) -> list[Stage]:
    """Return the stages that a config describes, those before the checkpoint to resume from left out.

    Raises:
        ValueError: A recipe has no stage, a stage's name or setting is unknown, or the checkpoint is of none of them.
    """
    if cfg.get("stages") is None:
        return [Stage(None, OmegaConf.create(plain(cfg)), cfg.ckpt_path)]
    names = list(cfg.stages)
    if not names:
        raise ValueError("stages is empty: a recipe needs at least one, such as experiment=bottlefit has")
    found = [Stage(name, stage_config(cfg, name), None) for name in names]
    if not cfg.ckpt_path:
        return found
    saved = read_checkpoint(cfg.ckpt_path)[KEY]["config"].get("stage")
    if saved not in names:
        raise ValueError(
            f"the checkpoint {cfg.ckpt_path} is of {f'stage {saved!r}' if saved else 'a run without stages'}, "
            f"but this recipe has {', '.join(names)}; resume with the recipe it was made by"
        )
    rest = found[names.index(saved) :]
    return [rest[0]._replace(ckpt_path=cfg.ckpt_path), *rest[1:]]


def stage_config(cfg: DictConfig, name: str) -> DictConfig:
    """Return the resolved config of one stage: its ``method`` and ``trainer`` over the run's."""
    if not NAME.fullmatch(str(name)):
        raise ValueError(f"stages.{name}: a stage's name is made of letters, digits, _ and -, as its folder is")
    known = ("method", "trainer")
    cfg = copy.deepcopy(cfg)
    settings = cfg.stages[name]
    for key in settings:
        if key not in known:
            raise ValueError(f"stages.{name}.{key} has no meaning; a stage has {', '.join(known)}."
                             + did_you_mean(str(key), known))  # fmt: skip
    if "_target_" not in settings.get("method", {}):
        raise ValueError(f"stages.{name}.method has no _target_: name an objective, /objective@stages.{name}.method: …")
    with open_dict(cfg):
        cfg.paths.checkpoints = str(Path(cfg.paths.checkpoints) / name)
        config = OmegaConf.create(plain(cfg))
        for key in known:
            if key in settings:
                config[key] = OmegaConf.merge(config[key], config.stages[name][key])
        config.stage = name
        config.stages = list(cfg.stages)
    return config
