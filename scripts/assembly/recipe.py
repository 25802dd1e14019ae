"""The steps of a run: one, or those of a recipe, each with its own method, trainer and checkpoints."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from cleave.architectures.naming import did_you_mean
from cleave.lightning_modules.callbacks.metadata import KEY
from cleave.reports.terminal import in_words
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.starting.terminal import is_users_mistake, unwrapped

NAME = re.compile(r"\w[\w-]*")
KNOWN = ("method", "training", "trainer", "feature_cache")


class Step(NamedTuple):
    """One fit of a run.

    Attributes:
        name: Its name in the recipe, ``None`` where the run is no recipe.
        config: The resolved config, with the step's own settings in place.
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
        """Its place among the steps of the recipe, from 1."""
        return 1 if self.name is None else list(self.config.steps).index(self.name) + 1

    @contextmanager
    def naming_mistakes(self) -> Iterator[None]:
        """Name the step in a mistake of its user's."""
        try:
            yield
        except Exception as error:
            if self.name is None or not is_users_mistake(error):
                raise
            raise ValueError(f"steps.{self.name}: {unwrapped(error)}") from error


def all_steps(cfg: DictConfig) -> list[Step]:
    """Return the steps of a run.

    Raises:
        ValueError: A recipe has no step, a step's name or setting is unknown, or several are to be private.
    """
    if cfg.get("steps") is None:
        if cfg.get("method") is None or "_target_" not in cfg.method:
            raise ValueError("method has no _target_; choose method=head_distillation, experiment=bottlefit or another")
        return [Step(None, OmegaConf.create(plain(cfg)), cfg.ckpt_path)]
    if not isinstance(cfg.steps, DictConfig) or not cfg.steps:
        raise ValueError(
            f"steps={cfg.steps} names no step; use a recipe such as experiment=bottlefit, or add one or more by "
            "+method@steps.NAME.method=knowledge_distillation"
        )
    steps = [Step(name, step_config(cfg, name), None) for name in map(str, cfg.steps)]
    if len(steps) > 1 and any(step.config.training.get("dp") for step in steps):
        raise ValueError(
            f"training.dp keeps account of one training, and the recipe {', '.join(map(str, cfg.steps))} trains on the "
            "same images several times; train what must be private in one run, base.ckpt_path=FILE for what came before"
        )
    return steps


def steps_to_go(cfg: DictConfig, steps: list[Step], checkpoint: Mapping[str, Any] | None) -> list[Step]:
    """Return the steps that a run goes through, those before the checkpoint to resume from left out.

    With ``train=false`` nothing but what the checkpoint is of, or else the last step, remains to be tested.

    Args:
        cfg: The run's config.
        steps: All its steps.
        checkpoint: What ``cfg.ckpt_path`` holds.

    Raises:
        ValueError: The checkpoint is of another method or recipe.
    """
    if checkpoint is None:
        return steps if cfg.train else steps[-1:]
    rest = steps[_place(steps, checkpoint[KEY]["config"], cfg.ckpt_path) :]
    rest[0] = rest[0]._replace(ckpt_path=cfg.ckpt_path)
    return rest if cfg.train else rest[:1]


def _place(found: list[Step], saved: Mapping[str, Any], path: str) -> int:
    """Return which of the steps a checkpoint is of."""
    names = [step.name for step in found]
    name, theirs = saved.get("step"), list(saved.get("steps") or [])
    here = f"this run is the recipe {', '.join(map(str, names))}" if names[0] else "this run is no recipe"
    if name not in names or (name and theirs[: theirs.index(name) + 1] != names[: names.index(name) + 1]):
        there = f"step {name!r} of the recipe {', '.join(theirs)}" if name else "a run without steps"
        raise ValueError(f"the checkpoint {path} is of {there}, but {here}; resume with what it was made by")
    place = names.index(name)
    ours, other = found[place].config.method._target_, saved["method"]["_target_"]
    if ours != other:
        at = f"steps.{name}.method" if name else "method"
        raise ValueError(f"the checkpoint {path} was made by {at}._target_={other}, but here it is {ours}")
    return place


def step_config(cfg: DictConfig, name: str) -> DictConfig:
    """Return the resolved config of one step: its own settings over the run's."""
    if not NAME.fullmatch(name):
        raise ValueError(f"steps.{name}: a step's name is made of letters, digits, _ and -, as its folder is")
    cfg = copy.deepcopy(cfg)
    settings = cfg.steps[name] if isinstance(cfg.steps[name], DictConfig) else {}
    for key in settings:
        if key not in KNOWN:
            raise ValueError(
                f"steps.{name}.{key} has no meaning: a step has {', '.join(KNOWN)}, such as "
                f"steps.{name}.trainer.max_epochs." + did_you_mean(str(key), KNOWN)
            )
    if "_target_" not in (settings.get("method") or {}):
        raise ValueError(
            f"steps.{name}.method has no _target_: name a method, such as "
            f"+method@steps.{name}.method=knowledge_distillation"
        )
    with open_dict(cfg):
        cfg.paths.checkpoints = str(Path(cfg.paths.checkpoints) / name)
        for key in KNOWN:
            if settings.get(key) is not None:
                # Before interpolations are resolved: callbacks watch what the step's training says. A method is taken
                # whole: what another one would take means nothing to it.
                if key == "method":
                    cfg[key] = _with_shared_terms(settings[key], cfg.get(key), name)
                else:
                    cfg[key] = settings[key] if cfg.get(key) is None else OmegaConf.merge(cfg[key], settings[key])
        config = OmegaConf.create(plain(cfg))
        config.step = name
        config.steps = {str(n): in_words(OmegaConf.select(cfg, f"steps.{n}.method._target_")) for n in cfg.steps}
    return config


def _with_shared_terms(method: DictConfig, shared: DictConfig | None, step: str) -> DictConfig:
    """Return a step's method with the terms that the run adds to every step, such as those of ``privacy=nopeek``.

    A step's own term of that name comes first; one that it sets to null is left out.

    Raises:
        ValueError: The run sets anything else of a method, which no step would read.
    """
    run = OmegaConf.create({}) if shared is None else shared
    for key in map(str, run):
        if key != "extra_terms" and "_target_" not in run:
            raise ValueError(
                f"method.{key} has no meaning in a recipe, whose steps have methods of their own; set "
                f"steps.{step}.method.{key}"
            )
    terms = cast(DictConfig, OmegaConf.merge(run.get("extra_terms") or {}, method.get("extra_terms") or {}))
    kept = {name: term for name, term in terms.items() if term is not None}
    if not terms:
        return method
    return cast(DictConfig, OmegaConf.merge(method, {"extra_terms": None}, {"extra_terms": kept}))
