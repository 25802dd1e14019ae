"""Keeping what a bundle says of itself free of the folders of the machine that wrote it."""

from __future__ import annotations

import re
from typing import Any

# An absolute path or one that leads out of its folder, alone or in a text such as ``base.ckpt_path=/data/best.ckpt``;
# neither the rest of a URL, nor ``layer1/logits``.
_START = r"(?<![\w./\\~)}\]-])(?:(?:file://)?/(?=[^/\s])|~[\w.-]*[/\\]|\.\.[/\\]|[A-Za-z]:[/\\]|\\\\(?=\w))"
_PATH = re.compile(_START + r"""[^\n"'=,:;\[\]{}]*""")


def without_paths(values: Any) -> Any:
    """Return JSON values in which of every absolute path its last part alone is left.

    Example:
        >>> without_paths({"ckpt_path": "/home/ada/runs/best.ckpt", "names": ["layer1/logits", "~/data/"]})
        {'ckpt_path': 'best.ckpt', 'names': ['layer1/logits', 'data']}
    """
    if isinstance(values, dict):
        return {_shortened(key): without_paths(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_paths(value) for value in values]
    return _shortened(values)


def _shortened(value: Any) -> Any:
    return _PATH.sub(_last_part, value) if isinstance(value, str) else value


def _last_part(found: re.Match[str]) -> str:
    return re.split(r"[/\\]", found[0].rstrip("/\\"))[-1]
