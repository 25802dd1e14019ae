"""Settings as a person can paste them behind a command: quoted for the shell and for Hydra."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"(?:[A-Za-z_]|\.{0,2}/)[\w./+-]*", re.ASCII)
_OTHER_TYPES = ("null", "true", "false", "inf", "nan")


def quoted(settings: Mapping[str, Any]) -> str:
    """Return settings as words of a command line.

    Args:
        settings: Values by key: texts, paths, numbers, ``None``, or lists of them.

    Example:
        >>> print(quoted({"ckpt_path": "my runs/lr=1.ckpt", "codec.bits": 4, "inputs": ["a", "b c"]}))
        'ckpt_path='"'"'my runs/lr=1.ckpt'"'"'' codec.bits=4 'inputs=[a,'"'"'b c'"'"']'
    """
    return shlex.join(f"{key}={in_hydra(value)}" for key, value in settings.items())


def in_hydra(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides, with quotation marks where it needs them."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(in_hydra, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _OTHER_TYPES:
        return text
    # What would be an interpolation, and each backslash before it or before a quotation mark, takes a backslash.
    text = re.sub(r"(\\*)\$\{", lambda found: f"{2 * found[1]}\\${{", text)
    text = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{text}'"
