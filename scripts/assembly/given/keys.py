"""Keys on the command line that nothing reads, and those that were meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

OPEN = ("inserts", "steps", "callbacks", "logger", "hydra", "bottleneck.at", "codec.at", "exits.policy")
"""Groups whose keys are the user's own; what has a ``_target_`` says by itself which arguments it takes."""
CHECKED_ELSEWHERE = dict.fromkeys(
    ("attack", "attribute_inference", "evaluate", "export", "exits_report", "image_codecs", "membership_inference"),
    ("data",),
)
"""Groups that stand for those of a checkpoint, which alone knows their keys."""
_NO_CHOICE = re.compile(r"Could not find '[\w/]+/([\w.-]+)'\n\nAvailable options in '[^']+':\n((?:\t[^\n]+\n?)+)")
_UNKNOWN = re.compile(r"Could not override '([^']+)'|Key '([^']+)' is not in struct")


def check_added(cfg: DictConfig, conf: str) -> None:
    """Refuse keys that were added on the command line (``+key=value``) and that nothing reads.

    Args:
        cfg: The composed config.
        conf: The folder with the scripts' configs.

    Raises:
        ValueError: There is such a key; the message lists those that it may have been meant for.
    """
    if not HydraConfig.initialized():
        return
    choices = HydraConfig.get().runtime.choices
    for key in added(list(HydraConfig.get().overrides.task)):
        files = {"": cfg.get("task_name"), key.partition(".")[0]: choices.get(key.partition(".")[0])}
        if key not in choices and not _is_read(cfg, key) and not _stands_in(key, files, Path(conf)):
            known = [each for each in known_keys(cfg) if each != key]
            raise ValueError(f"+{key} would be ignored: there is no such setting.{meant(key, known)}")


def added(overrides: Sequence[str]) -> Iterator[str]:
    """Yield the keys that overrides add, those inside a mapping one by one; choices of a group are none."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.package is not None or "/" in override.key_or_group
        adds = override.is_add() or override.is_force_add()
        if adds and not group and not override.is_sweep_override():
            yield from _below(override.value(), override.key_or_group)


def explained(message: str, config_name: str, conf: str, overrides: Sequence[str]) -> str:
    """Return what Hydra says of a key that it does not know, with those that may have been meant.

    Its own advice to add the key by `+` is left out: nothing would read it.
    """
    if missing := _NO_CHOICE.search(message):
        near = difflib.get_close_matches(missing[1].lower(), missing[2].split(), n=3, cutoff=0.6)
        return message.replace("\n\n", f". Did you mean {', '.join(near)}?\n\n", 1) if near else message
    found = _UNKNOWN.search(message)
    if found is None:
        return message
    key = found[1] or found[2]
    choices = [each for each in overrides if re.fullmatch(r"\+?[\w/]+(@[\w.]+)?=[\w/-]+", each)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf, version_base="1.3"):
            known = known_keys(compose(config_name, choices))
    except Exception:  # another mistake stands beside this one
        return message
    return f"there is no setting {key}.{meant(key, known)}"


def meant(key: str, known: Iterable[str]) -> str:
    """Return the settings that a key was meant for, as a sentence: those that end alike first, then similar ones."""
    leaves = list(known)
    groups = (".".join(each.split(".")[:length]) for each in leaves for length in range(1, each.count(".") + 1))
    known = list(dict.fromkeys([*leaves, *groups]))
    for start in range(key.count(".") + 1):
        ending = ".".join(key.split(".")[start:])
        if alike := [each for each in known if each.endswith(f".{ending}") or each == ending]:
            return f" Did you mean {', '.join(alike[:5])}?"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.7)
    last = {each.rpartition(".")[2]: each for each in reversed(known)}
    near = near or [last[each] for each in difflib.get_close_matches(key.rpartition(".")[2], last, n=3, cutoff=0.7)]
    return f" Did you mean {', '.join(near)}?" if near else ""


def known_keys(cfg: DictConfig) -> list[str]:
    """Return the dotted names of a config's values."""
    return list(_below(OmegaConf.to_container(cfg, resolve=False), ""))


def _below(value: Any, at: str) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _below(each, f"{at}.{key}" if at else str(key))
    else:
        yield at


def _stands_in(key: str, files: Mapping[str, Any], conf: Path) -> bool:
    """Whether a key stands in a file of the configs; what was given by ``++key=value`` may do so."""
    for group, name in files.items():
        file = conf / group / f"{name}.yaml"
        if name and file.is_file():
            keys = _below(OmegaConf.to_container(OmegaConf.load(file), resolve=False), group)
            if any(f"{each}.".startswith(f"{key}.") for each in keys):
                return True
    return False


def _is_read(cfg: DictConfig, key: str) -> bool:
    """Whether anything may read an added key: what a ``_target_`` builds, an open group, or another value."""
    task = str(cfg.get("task_name"))
    if any(key == group or key.startswith(f"{group}.") for group in (*OPEN, *CHECKED_ELSEWHERE.get(task, ()))):
        return True
    names = key.split(".")
    for length in range(1, len(names) + 1):
        node = OmegaConf.select(cfg, ".".join(names[:length]), throw_on_missing=False)
        if isinstance(node, DictConfig) and not node._is_none() and node.get("_target_") is not None:
            return True
    text = str(OmegaConf.to_container(cfg, resolve=False))
    if HydraConfig.initialized():
        text += str(list(HydraConfig.get().overrides.hydra))  # such as hydra.run.dir=logs/${name}
    leant_on = re.findall(r"\$\{\.*([\w.]+)\}", text)
    return any(f"{each}.".startswith(f"{key}.") or f"{key}.".startswith(f"{each}.") for each in leant_on)
