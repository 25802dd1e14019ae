"""Config files are parsed once a process: tests compose the same presets hundreds of times."""

from __future__ import annotations

import copy
import os
from typing import IO, Any

from omegaconf import OmegaConf

_parsed: dict[tuple[str, int, int], Any] = {}
_load = OmegaConf.load


def _remembered(file: IO[Any] | os.PathLike[str] | str) -> Any:
    """What a file holds, parsed anew where it has changed; each caller has a copy of its own."""
    if isinstance(file, str | os.PathLike):
        with open(file, encoding="utf-8") as opened:  # noqa: PTH123
            return _remembered(opened)
    try:
        stat, name = os.fstat(file.fileno()), os.fspath(file.name)
    except (OSError, AttributeError, TypeError):  # no file of a disk
        return _load(file)
    key = (name, stat.st_mtime_ns, stat.st_size)
    if key not in _parsed:
        _parsed[key] = _load(file)
    return copy.deepcopy(_parsed[key])


def parse_once() -> None:
    """Remember the files of configs, in this process and in those that it forks."""
    OmegaConf.load = _remembered  # type: ignore[method-assign, assignment]
