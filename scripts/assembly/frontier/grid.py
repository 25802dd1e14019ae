"""The points of a grid, as the config of a frontier gives them, and the run of each."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from cleave.reports.frontier.points import Place
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.given.keys import known_keys, meant
from cleave.scripts.assembly.networks import plain_value
from cleave.scripts.assembly.starting.terminal import CONF

LAYER, BITS, CHANNELS = "split.at", "codec.bits", "bottleneck.channels"
OWN = ("frontier", "wanted")
_AXES = {"layers": LAYER, "bits": BITS, "channels": CHANNELS}
_HIDES = ("larger", "smaller")


class GridPoint(NamedTuple):
    """A point of the grid.

    Attributes:
        place: Where it stands.
        settings: What tells its run from the others', by key.
    """

    place: Place
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name among files."""
        layer, bits, channels = self.place.split
        words = [layer, *(f"{value}{end}" for value, end in ((bits, "bits"), (channels, "channels")) if value)]
        words += [] if self.place.strength is None else [f"strength{self.place.strength!r}"]
        return re.sub(r"[^\w.+-]+", "_", "-".join(words))


def attack_keys() -> list[str]:
    """Return the keys of an attack's settings, which are no run's."""
    shared = cast(DictConfig, OmegaConf.load(Path(CONF, "attacking", "default.yaml")))
    return [str(key) for key in shared if key != "defaults"]


def grid_points(cfg: DictConfig) -> list[GridPoint]:
    """Return the points that a config names, strengths fastest.

    Raises:
        ValueError: A value is of another kind, stands there twice, or is of a setting that is not there.
    """
    values = {key: _values(cfg, name, key) for name, key in _AXES.items()}
    values = {key: found for key, found in values.items() if found}
    key = cfg.frontier.strength.key
    strengths = check_strengths(cfg)
    if strengths:
        values[key] = strengths
    points = []
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        layer = settings[LAYER]
        word = layer if isinstance(layer, str) else "+".join(layer)
        strength = settings[key] if strengths else None
        place = Place(word, settings.get(BITS), settings.get(CHANNELS), None if strength is None else float(strength))
        points.append(GridPoint(place, settings))
    return points


def check_strengths(cfg: DictConfig) -> list[int | float]:
    """Return the values of the strength; none where it is not varied.

    Raises:
        ValueError: There is no such setting, or its values are no different numbers.
    """
    own = cfg.frontier.strength
    key, values = own.key, _listed(own["values"])
    if own.hides_more not in (None, *_HIDES):
        raise ValueError(f"frontier.strength.hides_more must be larger, smaller or null, got {own.hides_more!r}")
    if key is None:
        if values:
            raise ValueError(
                f"frontier.strength.values={values} says nothing without frontier.strength.key=KEY, such "
                "as noise.epsilon"
            )
        return []
    if not isinstance(key, str) or key in (LAYER, BITS, CHANNELS) or key.split(".")[0] in (*OWN, *attack_keys()):
        raise ValueError(
            f"frontier.strength.key={key} is no strength of a defence; name a setting such as noise.epsilon, and "
            "layers, bits and channels by frontier.layers, frontier.bits and frontier.channels"
        )
    nothing = object()
    now = OmegaConf.select(cfg, key, default=nothing, throw_on_missing=False)
    # A value that is still to be given selects as nothing, too.
    if now is nothing and key not in known_keys(cfg):
        known = [each for each in known_keys(cfg) if not each.startswith(("frontier.", "wanted."))]
        raise ValueError(f"frontier.strength.key={key}: there is no such setting.{meant(key, known)}")
    if OmegaConf.is_config(now) or isinstance(now, str | bool):
        raise ValueError(f"frontier.strength.key={key} is {plain_value(now)!r}, no number that could be varied")
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong or not all(map(math.isfinite, values)):
        raise ValueError(f"frontier.strength.values must be numbers, got {values}")
    if not values or len(set(values)) < len(values):
        raise ValueError(f"frontier.strength.values must be one or more different numbers of {key}, got {values}")
    return values


def smaller_hides_more(cfg: DictConfig) -> bool:
    """Return whether a smaller strength is a stronger defence."""
    own = cfg.frontier.strength
    if own.hides_more is not None:
        return bool(own.hides_more == "smaller")
    return str(own.key).rpartition(".")[2] == "epsilon"


def strength_word(cfg: DictConfig) -> str | None:
    """Return what the strength is called; ``None`` where none is varied."""
    key = cfg.frontier.strength.key
    return None if key is None else str(key).rpartition(".")[2]


def run_config(cfg: DictConfig, settings: dict[str, Any]) -> DictConfig:
    """Return the config of a run of ``train.py``: without what is a frontier's own, and with a point's settings."""
    found = copy.deepcopy(cfg)
    with open_dict(found):
        for key in (*OWN, *attack_keys()):
            found.pop(key, None)
        for key, value in settings.items():
            OmegaConf.update(found, key, list(value) if isinstance(value, tuple) else value)
    return found


def attack_config(cfg: DictConfig, checkpoint: Path | str) -> DictConfig:
    """Return the config by which a point's checkpoint is attacked."""
    values = plain(cfg)
    given = {key: values[key] for key in (*attack_keys(), "seed")}
    more: dict[str, Any] = {
        "ckpt_path": str(checkpoint),
        "bundle": None,
        "trust_checkpoint": True,
        "at": None,
        "data": {},
    }
    return OmegaConf.create(given | more)


def _listed(value: Any) -> list[Any]:
    value = plain_value(value)
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _values(cfg: DictConfig, name: str, key: str) -> list[Any]:
    """Return the values of an axis; the run's own where none are given, and none where it has no such setting."""
    given = _listed(cfg.frontier[name])
    own = plain_value(OmegaConf.select(cfg, key))
    _check_apart(cfg, name, key, given)
    if not given:
        if key == LAYER and own is None:
            raise ValueError(
                "split.at=null: nothing is sent that could be attacked; set split.at=LAYER or frontier.layers"
            )
        return [] if own is None else [tuple(own) if isinstance(own, list) else own]
    kind, words = (str, "names of layers") if key == LAYER else (int, "whole numbers")
    if any(isinstance(value, bool) or not isinstance(value, kind) for value in given):
        raise ValueError(f"frontier.{name} must be {words}, got {given}")
    if len(set(given)) < len(given):
        raise ValueError(f"frontier.{name}={given} names a value twice; each point is trained once")
    return given


def _check_apart(cfg: DictConfig, name: str, key: str, given: list[Any]) -> None:
    """Refuse values that would change nothing.

    Raises:
        ValueError: The run has no such setting, or other settings decide.
    """
    if not given or key == LAYER:
        return
    group, _, setting = key.partition(".")
    if setting not in cfg[group]:
        raise ValueError(f"frontier.{name}={given}: {group} has no {setting} here; leave frontier.{name} out")
    if key == CHANNELS and cfg.split.form == "none":
        raise ValueError(
            f"frontier.{name}={given} would change nothing: split.form=none sends the feature itself; set "
            "split.form=insert or replace"
        )
    for layer, own in (plain_value(cfg[group].get("at")) or {}).items():
        if setting in (own or {}):
            raise ValueError(
                f"frontier.{name}={given} would change nothing at {layer}, where {group}.at.{layer}.{setting} decides; "
                "leave one of the two out"
            )
