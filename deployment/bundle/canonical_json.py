"""JSON with one spelling per value, so that a digest covers every value, and with the keys that are expected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import rfc8785

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


def canonical(values: Any) -> bytes:
    """Spell JSON values as RFC 8785 does, so that every language spells them alike: UTF-8, compact, keys sorted.

    Raises:
        ValueError: A number is not finite, or a whole number beyond ±(2^53 - 1), which not every language can hold; a
            text is no Unicode; or the values are nested too deeply.
        TypeError: A value is not JSON.
    """
    # Through JSON first: keys that are numbers become strings there, and sort as such.
    try:
        return rfc8785.dumps(json.loads(json.dumps(values, allow_nan=False)))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"a text is no Unicode: {error.object!a:.60}") from None
    except rfc8785.CanonicalizationError as error:
        raise ValueError(f"it has no spelling by RFC 8785: {error}") from None


def digest(values: Any) -> str:
    """SHA-256 over the spelling of :func:`canonical`, 64 hexadecimal digits; raises as that does."""
    return hashlib.sha256(canonical(values)).hexdigest()


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
        if not isinstance(values[key], kind) or (isinstance(values[key], bool) and kind is not bool):
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
