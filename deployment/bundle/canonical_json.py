"""JSON with one spelling per value, so that a digest covers every byte, and with the keys that are expected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..naming import listed
from .files import BundleError
from .limits import check_depth


def dump(values: Any) -> bytes:
    """Spell JSON values for people: indented, keys in their order, a newline at the end.

    Raises:
        ValueError: A number is not finite.
        TypeError: A value is not JSON.
    """
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode("ascii")


def digest(values: Any) -> str:
    """SHA-256 over the compact spelling with sorted keys, 64 hexadecimal digits."""
    # Through JSON first: keys that are numbers become strings there, and sort as such.
    plain = json.loads(json.dumps(values, allow_nan=False))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def parse(content: bytes) -> Any:
    """Read JSON strictly.

    Raises:
        ValueError: It is not JSON in UTF-8, repeats a key, has a number that is not finite, or is nested too deeply.
    """
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    check_depth(values, "it")
    return values


def typed(values: Any, where: str, **types: Any) -> dict[str, Any]:
    """Return ``values`` if it is an object with exactly these keys and types; :class:`BundleError` otherwise."""
    if not isinstance(values, Mapping):
        raise BundleError(f"{where} must be an object, got {type(values).__name__}")
    if missing := types.keys() - values.keys():
        raise BundleError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := values.keys() - types.keys():
        raise BundleError(
            f"{where} has the unknown keys {listed(sorted(map(str, unknown)))}; known are {', '.join(types)}"
        )
    for key, kind in types.items():
        if not isinstance(values[key], kind) or isinstance(values[key], bool):
            raise BundleError(f"{where}: {key} has the wrong type, {type(values[key]).__name__}")
    return dict(values)


def all_of(values: list[Any], kind: type, where: str) -> list[Any]:
    """Return ``values`` if each is of one type; :class:`BundleError` otherwise."""
    if wrong := [value for value in values if not isinstance(value, kind)]:
        raise BundleError(f"{where} has an entry of the wrong type: {wrong[0]!r:.200}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated!r:.200} appears twice")
    return values


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
