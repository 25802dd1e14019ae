"""JSON objects with exactly the keys and types that are expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .files import BundleError


def typed(values: Any, where: str, **types: Any) -> dict[str, Any]:
    """Return ``values`` if it is an object with exactly these keys and types; :class:`BundleError` otherwise."""
    if not isinstance(values, Mapping):
        raise BundleError(f"{where} must be an object, got {type(values).__name__}")
    if missing := types.keys() - values.keys():
        raise BundleError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := values.keys() - types.keys():
        raise BundleError(f"{where} has the unknown keys {', '.join(sorted(unknown))}; known are {', '.join(types)}")
    for key, kind in types.items():
        if not isinstance(values[key], kind) or isinstance(values[key], bool):
            raise BundleError(f"{where}: {key} has the wrong type, {type(values[key]).__name__}")
    return dict(values)


def all_of(values: list[Any], kind: type, where: str) -> list[Any]:
    """Return ``values`` if each is of one type; :class:`BundleError` otherwise."""
    if wrong := [value for value in values if not isinstance(value, kind)]:
        raise BundleError(f"{where} has an entry of the wrong type: {wrong[0]!r}")
    return values
