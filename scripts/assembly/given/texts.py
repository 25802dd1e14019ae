"""Settings that are texts, settings that a command would ignore, and errors that name a setting in full."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cleave.scripts.assembly.starting.nulls import CONF


def check_texts(cfg: DictConfig, known: Mapping[str, str], null: bool = True) -> None:
    """Refuse values that are no text where a name, a file or an address belongs: `token=true`, `device=1`.

    Args:
        cfg: The config.
        known: What each setting is, by its key.
        null: Whether they may be null as well.

    Raises:
        ValueError: There is one; the message names its key, what belongs there, and what is there.
    """
    for key, what in known.items():
        value = OmegaConf.select(cfg, key)
        if (null and value is None) or (isinstance(value, str) and (value or null)):
            continue
        more = " or null" if null else ""
        quote = "; quote a name that looks like another value, '\"…\"'" if isinstance(value, bool | int | float) else ""
        raise ValueError(f"{key} must be {what}{more}, got {spelled(value)}{quote}")


def spelled(value: Any) -> str:
    """Return a value as one would type it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) if value != "" else "nothing"


def changed_settings(cfg: DictConfig, group: str, but: str = "") -> list[str]:
    """Return the settings of a group, as `KEY=VALUE`, that are other than the script's config has them.

    Args:
        cfg: The config.
        group: The group.
        but: One that doesn't count.
    """
    own = OmegaConf.select(OmegaConf.load(CONF / f"{cfg.task_name}.yaml"), group)
    given = cfg[group]
    return [f"{group}.{key}={spelled(given[key])}" for key in given if key != but and given[key] != own.get(key)]


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Put the keys of settings in place of the arguments that an error names: `remote.timeout must be …`.

    What is built from settings knows its arguments, and not what a config calls them. An error begins with the argument
    that is wrong, and says `ARGUMENT=VALUE` of others. What it says of anything else stays as it is.

    Args:
        names: Keys by argument.
    """
    try:
        yield
    except ValueError as error:
        known = "|".join(map(re.escape, names))
        pattern = rf"^({known})\b|(?<!\S)({known})(?==)"
        words = re.sub(pattern, lambda found: names[found[0]], str(error)) if names else str(error)
        if words == str(error):
            raise
        raise ValueError(words) from error


def in_group(cfg: DictConfig, group: str) -> dict[str, str]:
    """Return the keys of a group by their last names, see :func:`naming`."""
    return {str(key): f"{group}.{key}" for key in cfg[group]}
