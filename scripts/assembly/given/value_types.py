"""Values of another type than what they are for: `ten` for a number, `yes` for true."""

from __future__ import annotations

import collections.abc
import datetime
import functools
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

WORDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", type(None): "null"}
_CONTAINERS = (list, tuple, dict, set, collections.abc.Sequence, collections.abc.Mapping, collections.abc.Iterable)
_NO_TEXT = (torch.Tensor, datetime.timedelta)
STANDS_FOR_STEPS = "total_steps"
OWN_SETTINGS = ("extras", "host")
"""Groups without a ``_target_`` whose defaults say what their values are."""
NOT_NULL = {"serve": (), "infer": ("limit",)}
"""Scripts whose numbers must all be there, but for some: null is refused with the words for any other value."""
SHARED = "attacking"
"""Settings of several scripts, which stand beside each one's own."""


def check_values(cfg: DictConfig, conf: str) -> None:
    """Refuse values of a config that are of another type than the argument, or the setting, that they are for.

    Only what can be said for sure is refused: a text where a number or a truth value belongs, a truth value or a
    fraction for a whole number, and null where there must be something.

    Args:
        cfg: The composed config.
        conf: The folder with the scripts' configs.

    Raises:
        TypeError: A value is of another type; the message names its key.
    """
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    for key, value, allowed in [*_arguments(values, ""), *_settings(values, Path(conf))]:
        if not _fits(value, allowed):
            said = [each for each in allowed if each is not int or float not in allowed]
            known = " or ".join(WORDS[each] for each in said)
            raise TypeError(f"{key} must be {known}, got {value!r}")


def _arguments(node: Any, at: str) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """Yield the plain values that go to what a ``_target_`` names, with the types that it allows."""
    if isinstance(node, list):
        for number, value in enumerate(node):
            yield from _arguments(value, f"{at}.{number}")
    if not isinstance(node, dict):
        return
    allowed = allowed_types(node["_target_"]) if isinstance(node.get("_target_"), str) else {}
    for key, value in node.items():
        place = f"{at}.{key}" if at else str(key)
        if key in allowed and value != STANDS_FOR_STEPS:
            yield place, value, allowed[key]
        yield from _arguments(value, place)


@functools.cache
def allowed_types(target: str) -> dict[str, tuple[type, ...]]:
    """Return the arguments of what a dotted name stands for that are numbers, truth values or null alone."""
    if target == "???":
        return {}
    try:
        factory = get_object(target)
        found: dict[str, tuple[type, ...]] = {}
        for function in _signatures(factory):
            found = _of_function(function) | found
    except Exception:  # what cannot be imported or read is named where it is built
        return {}
    return found


def _signatures(factory: Any) -> Iterator[Any]:
    """Yield what takes the arguments of a factory; a class with `**options` hands them to the classes above it."""
    if not inspect.isclass(factory):
        yield factory
        return
    for each in factory.__mro__[:-1]:
        if "__init__" in vars(each):
            function = vars(each)["__init__"]
            yield function
            kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                return


def _of_function(function: Any) -> dict[str, tuple[type, ...]]:
    found, hints = {}, typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        members = set(_members(hints.get(name)))
        if members and parameter.default is not inspect.Parameter.empty:
            members.add(list if isinstance(parameter.default, _CONTAINERS[:4]) else type(parameter.default))
        if members and members <= set(WORDS) and members != {type(None)}:
            found[name] = tuple(each for each in WORDS if each in members)
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for each in typing.get_args(hint) for member in _members(each))
    if (typing.get_origin(hint) or hint) in _CONTAINERS:
        return (list,)
    return () if hint is None or hint in _NO_TEXT else (hint,)


def _settings(values: Mapping[str, Any], conf: Path) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """Yield the script's own settings, whose defaults say what they are: those without a ``_target_``."""
    may_be_null = NOT_NULL.get(str(values.get("task_name")))

    def search(default: Any, value: Any, at: str) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
        if isinstance(default, dict) and isinstance(value, dict):
            for key in default.keys() & value.keys():
                yield from search(default[key], value[key], f"{at}.{key}" if at else key)
        elif isinstance(default, bool):
            yield at, value, (bool,)
        elif isinstance(default, int | float):
            null = () if may_be_null is not None and at not in may_be_null else (type(None),)
            yield at, value, (type(default), *null)

    files = [("", file) for file in _of_script(conf / f"{values.get('task_name')}.yaml")]
    files += [(group, conf / group / "default.yaml") for group in OWN_SETTINGS if group in values]
    for group, file in files:
        if file.is_file():
            default = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            yield from search(default, values[group] if group else values, group)


def _of_script(file: Path) -> Iterator[Path]:
    """Yield a script's config, and those of scripts and shared settings that it builds on."""
    if file.is_file():
        yield file
        defaults = cast(DictConfig, OmegaConf.load(file)).get("defaults") or []
        yield from (each for name in defaults if isinstance(name, str) for each in _of_script(file.with_stem(name)))
        if {SHARED: "default"} in defaults:
            yield file.parent / SHARED / "default.yaml"


def _fits(value: Any, allowed: tuple[type, ...]) -> bool:
    if value is None:
        return type(None) in allowed
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return int in allowed or float in allowed or (bool in allowed and value in (0, 1))
    if isinstance(value, float):
        return float in allowed or (int in allowed and value.is_integer())
    if isinstance(value, list):
        return list in allowed
    return not isinstance(value, str) or value == "???" or "${" in value
