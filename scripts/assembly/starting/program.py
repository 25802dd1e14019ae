"""How this command was started, so that others are named alike: as installed ones, or as scripts of a clone."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from cleave.scripts.assembly.starting.project import project_options, short_path

PREFIX = "cleave-"
CLONE = Path(__file__).resolve().parents[3]


def program(name: str) -> str:
    """Return what starts a command, quoted for the shell, in the way in which this one was started.

    A project's ``--config-dir`` is part of it, as the project's checkpoints may name its code.

    Args:
        name: A script's name, such as ``exits_report``.
    """
    return shlex.join([*started(name), *project_options()])


def started(name: str) -> list[str]:
    """Return the words that start a command, without options, in the way in which this one was started."""
    own, installed = Path(sys.argv[0]), console_script(name)
    if own.name.startswith(PREFIX):
        found = shutil.which(installed)
        beside = own.with_name(installed)
        return [installed if found and beside.exists() and Path(found).samefile(beside) else short_path(beside)]
    script = Path("scripts", f"{name}.py")
    if own.with_name(script.name).is_file() and own.parent.name == "scripts":
        return ["python", short_path(own.with_name(script.name))]
    # Called from a notebook or a test.
    return ["python", str(script)] if (CLONE / "pyproject.toml").is_file() else [installed]


def console_script(name: str) -> str:
    """Return what a script is called where the package is installed: ``cleave-exits-report``."""
    return PREFIX + name.replace("_", "-")
