"""Settings of a part that the network does not have: they change nothing, and whoever set them should know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from cleave.architectures.linking.described import crosses, is_linked
from cleave.reports.terminal import say
from cleave.scripts.assembly.networks import plain_value
from cleave.scripts.assembly.starting.terminal import CONF

APART = ("split.at", "feature_cache.use", "feature_cache.directory")
"""What says that a part is there, and where it is kept."""
SEARCH = "search_paths.yaml"
Idle = tuple[list[str], str]
"""Settings without effect, as overrides, and what to set to give them one."""


@rank_zero_only
def say_what_is_idle(cfg: DictConfig, settings: Callable[[DictConfig], Iterable[Idle]] | None = None) -> None:
    """Name the settings of a run that are not the default and have no effect, with what would give them one.

    Args:
        cfg: The config of a run.
        settings: Finds them; ``None``: :func:`idle`.
    """
    for keys, reason in (settings or idle)(cfg):
        has = "has" if len(keys) == 1 else "have"
        say(f"{', '.join(keys)} {has} no effect: {reason}, or leave {'it' if len(keys) == 1 else 'them'} out")


def idle(cfg: DictConfig) -> Iterator[Idle]:
    """Yield the settings that have no effect, those with one reason together, and what to set to give them one."""
    yield from _idle_of_links(cfg)
    crossing = crosses(plain_value(cfg.links.path))
    if cfg.split.at is None and crossing:
        # What crosses is sent all the same: it has an envelope, and a channel disturbs it.
        keys = [key for group in ("split", "bottleneck", "codec") for key in changed(cfg, group)]
        if keys := [key for key in keys if not key.startswith("split.envelope=")]:
            yield keys, "what crosses is sent as float32; name where it does, such as split.at=local/LAYER"
    elif cfg.split.at is None:
        groups = ("split", "bottleneck", "codec", "noise", "channel")
        if keys := [key for group in groups for key in changed(cfg, group)]:
            yield keys, "the network is not split; add split.at=LAYER"
    elif cfg.split.form == "none" and (keys := changed(cfg, "bottleneck")):
        yield keys, "split.form=none sends the feature itself; set split.form=insert or replace"
    if cfg.exits.at is None and cfg.exits.count is None and (keys := changed(cfg, "exits")):
        yield keys, "the network has no early exits; add exits.at=[LAYER] or exits.count=NUMBER"
    if not cfg.feature_cache.use and (keys := changed(cfg, "feature_cache")):
        yield keys, "nothing is stored; add feature_cache.use=true"


def _idle_of_links(cfg: DictConfig) -> Iterator[tuple[list[str], str]]:
    """Yield the settings of links without a path, and those of a host where none runs."""
    if not is_linked(cfg):
        if keys := [*changed(cfg, "links"), *changed(cfg, "host")]:
            yield keys, "no path leads over links; add links.path=[LOUT,HIN,HOUT,LIN]"
    elif not crosses(plain_value(cfg.links.path)):
        keys = [key for key in changed(cfg, "links") if key.startswith("links.host_")]
        if keys := [*keys, *changed(cfg, "host")]:
            yield keys, "a skip-connection has no host; give links.path all four blocks"


def idle_of_search(cfg: DictConfig) -> Iterator[Idle]:
    """Yield the settings of a search of paths that its strategy, or what paths are worth, does not use."""
    default = cast(dict[str, Any], OmegaConf.to_container(cast(DictConfig, OmegaConf.load(Path(CONF, SEARCH)))))
    own = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))["search"]
    before = default["search"] | {"algorithm": default["search"]["algorithm"] | {"seed": cfg.seed}}
    keys = list(_differences(own["algorithm"], before["algorithm"], "search.algorithm"))
    if own["strategy"] == "random":
        keys = [key for key in keys if not key.startswith("search.algorithm.seed=")]
    if own["strategy"] in ("random", "exhaustive") and keys:
        yield keys, f"a search by search.strategy={own['strategy']} does not predict; set search.strategy=mended"
    if own["cost"] is not None and (keys := list(_differences(own["reward"], before["reward"], "search.reward"))):
        yield keys, "search.cost says what paths are worth; set search.cost=null"


def changed(cfg: DictConfig, group: str) -> list[str]:
    """Return the settings of a group that differ from the default, as overrides; the group alone if it was replaced."""
    default = defaults(group)
    own = cast(dict[str, Any], OmegaConf.to_container(cfg.get(group) or OmegaConf.create(), resolve=True))
    if own.get("_target_") != default.get("_target_"):
        return [f"{group} ({str(own.get('_target_')).rpartition('.')[2]})"] if own.get("_target_") else []
    return list(_differences(own, default, group))


def defaults(group: str) -> dict[str, Any]:
    """Return a group as ``conf/train.yaml`` has it: in the preset that it chooses, or in itself."""
    train = cast(DictConfig, OmegaConf.load(Path(CONF, "train.yaml")))
    chosen = {name: preset for each in train.defaults if isinstance(each, DictConfig) for name, preset in each.items()}
    found = OmegaConf.load(Path(CONF, group, f"{chosen[group]}.yaml")) if group in chosen else train[group]
    return cast(dict[str, Any], OmegaConf.to_container(found))


def _differences(own: dict[str, Any], default: dict[str, Any], at: str) -> Iterator[str]:
    for name, value in own.items():
        before = default.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from _differences(value, before, f"{at}.{name}")
        elif value != before and f"{at}.{name}" not in APART:
            yield f"{at}.{name}={value}"
