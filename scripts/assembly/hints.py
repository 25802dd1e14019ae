"""The commands that a command names: what to type next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cleave.architectures.described import GROUPS
from cleave.lightning_modules.checkpoints.trust import foreign
from cleave.lightning_modules.command_line import quoted
from cleave.reports.terminal import say_next
from cleave.scripts.assembly.starting.program import program


def command(name: str, settings: Mapping[str, Any]) -> str:
    """Return a command line that can be pasted.

    Args:
        name: A script's name, such as ``exits_report``.
        settings: Its settings by key.
    """
    return f"{program(name)} {quoted(settings)}".rstrip()


def next_command(name: str, settings: Mapping[str, Any], more: str = "") -> None:
    """Print the command to type next.

    Args:
        name: A script's name.
        settings: Its settings by key.
        more: What follows and is to be filled in, such as ``…``.
    """
    say_next(" ".join(filter(None, [command(name, settings), more])))


def vouching(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return the setting that whoever reads a run's checkpoint needs, where the run's config names code of one's own.

    Args:
        config: The run's config as plain containers.
    """
    read = {part: config.get(part) for part in (*GROUPS, "data")}
    return {"trust_checkpoint": True} if any(foreign(read)) else {}
