"""What a resumed run was given otherwise than the run that it goes on with, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from cleave.lightning_modules.callbacks.metadata import KEY
from cleave.lightning_modules.command_line import in_hydra
from cleave.lightning_modules.resuming import resume_command
from cleave.reports.terminal import console
from cleave.scripts.assembly.starting.program import started
from cleave.scripts.assembly.starting.project import project_options
from cleave.scripts.assembly.starting.terminal import is_users_mistake, unwrapped

# Where things lie, how a run is watched and what follows it: none of it changes a weight.
_APART = re.compile(
    r"paths\.|extras\.|logger\b|tags|task_name|cuts$|trained$|steps$|step$|ckpt_path$|optimized_metric|export$|test$|train$"
    r"|trainer\.(default_root_dir|enable_|profiler|log_every_n_steps|logger|callbacks)"
    r"|callbacks\.(progress|learning_rate|last|guard)\b|callbacks\.\w+\.dirpath"
    r"|data\.(num_workers|pin_memory|cache|eval_batch_size)$|feature_cache\.directory|links\.placements"
)
_WITHIN: ContextVar[tuple[tuple[str, ...], Mapping[str, Any]] | None] = ContextVar("within", default=None)
_OPTIMIZER = "ignored, as the optimizer goes on in the state that the checkpoint holds"
_SCHEDULE = "ignored, as the schedule goes on as the checkpoint holds it"
_WEIGHTS = "ignored, as the weights are the checkpoint's"
_STOPPING = "ignored, as early stopping goes on in the state that the checkpoint holds"
_EFFECTS = (
    (r"training\.optimizer\.", _OPTIMIZER),
    (r"training\.scheduler$", "the schedule goes on from where the rate is"),
    (r"training\.scheduler\.", _SCHEDULE),
    (r"((base|host)\.ckpt_path|host\.weights|(host\.)?backbone\.(weights|pretrained))$", _WEIGHTS),
    (r"callbacks\.early_stopping\.patience$", _STOPPING),
    (r"((data|training)\.)?seed$", "from here on: other order, augmentation and dropout than without the interruption"),
    (
        r"data\.batch_size$",
        "from here on; an epoch under way goes on at the same batch number, so it leaves images out or repeats some",
    ),
)
"""What becomes of settings, the first that fits; any other holds from here on."""
_UNCHANGEABLE = re.compile(
    r"training\.(optimizer|scheduler)\._target_$|training\.(lr_scales|layer_decay|decay_norms_and_biases)\b|method\.train$"
)


class Difference(NamedTuple):
    """A setting of which the checkpoint holds another value."""

    key: str
    before: Any
    now: Any

    @property
    def effect(self) -> str:
        """What becomes of it."""
        return next((words for pattern, words in _EFFECTS if re.match(pattern, self.key)), "from here on")

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} → {_shown(self.now)}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return the settings of two resolved configs that differ, but for what changes no weight."""

    def search(one: Any, other: Any, at: str) -> Iterator[Difference]:
        if at and _APART.match(at):
            return
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for key in dict.fromkeys([*one, *other]):
                yield from search(one.get(key), other.get(key), f"{at}.{key}" if at else str(key))
        elif one != other and not (_empty(one) and _empty(other)):
            yield Difference(at, one, other)

    found = list(search(before, now, ""))
    seed = next((each[1:] for each in found if each.key == "seed"), None)
    return [each for each in found if each.key not in ("data.seed", "training.seed") or each[1:] != seed]


def weighty(config: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return a resolved config without what changes no weight, and without groups that then are empty."""
    found = {}
    for key, value in config.items():
        name = f"{at}.{key}" if at else str(key)
        kept = weighty(value, name) if isinstance(value, Mapping) and value else value
        if not _APART.match(name) and (kept or not value):
            found[str(key)] = kept
    return found


@contextmanager
def explained(cfg: DictConfig, checkpoint: Mapping[str, Any] | None) -> Iterator[None]:
    """Say to repeat the run's options where a resumed run cannot be built without them."""
    try:
        yield
    except Exception as error:
        if not is_users_mistake(error) or checkpoint is None:
            raise
        if not (command := whole_command(cfg, checkpoint, changed=False)):
            raise
        raise ValueError(f"{unwrapped(error)}\nRepeat the run's options: {command}") from error


def compare(cfg: DictConfig, config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """List what a run was given otherwise than the checkpoint that it is resumed from.

    Args:
        cfg: The run's config.
        config: The resolved config of the step that is resumed.
        checkpoint: The checkpoint.

    Raises:
        ValueError: A setting differs that decides what the optimizer's or the schedule's state is of.
    """
    found = differences(checkpoint[KEY]["config"], config)
    fixed = [each for each in found if _UNCHANGEABLE.match(each.key)]
    if fixed:
        raise ValueError(
            f"the checkpoint {cfg.ckpt_path} cannot be resumed with {'; '.join(map(str, fixed))}: the state of its "
            "optimizer and schedule would not fit; leave that as it was, or start anew from its weights, "
            "base.ckpt_path=FILE"
        )
    tell(cfg, config, checkpoint, found)


@rank_zero_only
def tell(
    cfg: DictConfig, config: Mapping[str, Any], checkpoint: Mapping[str, Any], found: Sequence[Difference]
) -> None:
    """Print what differs and whether anything is left to train."""
    if found:
        lines = [f"  {each}: {each.effect}" for each in found]
        if command := whole_command(cfg, checkpoint, changed=True):
            lines.append(f"Repeat the run's options to go on as it would have: {command}")
        _print("\n".join([f"Resumed with other settings than those in {cfg.ckpt_path}:", *lines]))
    if "loops" not in checkpoint:  # of weights alone, which Lightning refuses
        return
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    steps = checkpoint["global_step"]
    for key, done in (("max_epochs", epochs), ("max_steps", steps)):
        limit = config["trainer"].get(key)
        if limit is not None and 0 <= limit <= done:
            _print(
                f"{cfg.ckpt_path} is at the end of its training, {epochs} epochs and {steps} steps: nothing is left to "
                f"train with trainer.{key}={limit}"
            )
            return


def whole_command(cfg: DictConfig, checkpoint: Mapping[str, Any], *, changed: bool) -> str | None:
    """Return the command that resumes a run with all its options; ``None`` where none of them was left out.

    Args:
        cfg: The run's config.
        checkpoint: The checkpoint that it is resumed from.
        changed: Whether what the run was given now stands in the command, too.
    """
    given = overrides()
    keys = {_key(each) for each in given}
    first = [
        each for each in checkpoint[KEY].get("overrides", []) if not _key(each).startswith(("ckpt_path", "hydra."))
    ]
    missing = [each for each in first if _key(each) not in keys]
    if not missing:
        return None
    kept = [*missing, *given] if changed else first
    return resume_command(started("train"), [*project_options(), *kept], str(cfg.ckpt_path))


@contextmanager
def run_of_another(own: Sequence[str], settings: Mapping[str, Any]) -> Iterator[None]:
    """Say of the runs within that another script than ``train.py`` trains them, which its command could not repeat.

    Args:
        own: Keys and groups that are the script's own.
        settings: What it sets in its command's place, by key.
    """
    token = _WITHIN.set((tuple(own), settings))
    try:
        yield
    finally:
        _WITHIN.reset(token)


def overrides() -> list[str]:
    """Return what the command was given on its line; of a run that another script trains, what train.py would be."""
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    within = _WITHIN.get()
    if not HydraConfig.initialized() or within is None:
        return given
    own, settings = within
    keys = (*own, *settings)
    kept = [each for each in given if not any(f"{_key(each).lstrip('~')}.".startswith(f"{key}.") for key in keys)]
    return [*kept, *(f"{key}={in_hydra(value)}" for key, value in settings.items())]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _empty(value: Any) -> bool:
    return value is None or value == {} or value == []


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("_target_", "…"))
    return "null" if value is None else str(value)


def _print(message: str) -> None:
    console.print(message, soft_wrap=True, highlight=False, markup=False)
