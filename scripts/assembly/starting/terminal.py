"""How a command starts and ends: a user's mistakes as one line, quiet frameworks, signals.

Until a config stands nothing here needs torch or Lightning, which take seconds to import: ``--help``, completion and a
misspelt key do without them.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cleave.scripts.assembly.given import keys, paths
from cleave.scripts.assembly.starting import outlets
from cleave.scripts.assembly.starting.extras import apply_extras
from cleave.scripts.assembly.starting.hydra_extensions import extend_hydra, missing_extra
from cleave.scripts.assembly.starting.logs import quiet
from cleave.scripts.assembly.starting.nulls import CONF as CONFIGS
from cleave.scripts.assembly.starting.nulls import refuse_null_choices, refuse_null_groups
from cleave.scripts.assembly.starting.project import import_projects
from cleave.scripts.assembly.starting.quoting import unreadable
from cleave.scripts.assembly.starting.sweeps import FailedJob, run_job, sweeping, told

if TYPE_CHECKING:
    from cleave.lightning_modules.signals import Stopped

CONF = str(CONFIGS)
FULL_ERRORS = os.environ.get("HYDRA_FULL_ERROR") == "1"
UNFINISHED = "It did not finish; what it reads is as it was, and the same command starts it again."
GOING_ON = ("serve",)
"""Commands that go on where nobody reads what they print."""
OF_AN_EXTRA = re.compile(r"\bthe extra `[a-z]+`")
USER_ERRORS = (ValueError, TypeError, OSError, HydraException, OmegaConfBaseException)


def run(name: str) -> NoReturn:
    """Run a command: ``main`` of the script of that name, with the config that the command line composes.

    The script is imported once the config stands.
    """

    def main(cfg: DictConfig) -> Any:
        return importlib.import_module(f"cleave.scripts.{name}").main(cfg)

    if name in GOING_ON:
        outlets.go_on()

    def composed() -> None:
        refuse_null_choices(name, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=CONF, config_name=name)(friendly(main))()

    main.__module__ = f"cleave.scripts.{name}"  # by which Hydra calls the job
    start(composed)
    raise SystemExit


def friendly(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Turn a user's mistake into one line and exit status 1; ``HYDRA_FULL_ERROR=1`` shows where it arose.

    A config value that is still missing is named before anything is built. A job of a sweep fails alone.
    """

    def checked(cfg: DictConfig) -> Any:
        outlets.heed(logging.getLogger().handlers)  # some libraries log while they are imported
        apply_extras(cfg)
        paths.settle(cfg)
        keys.check_added(cfg, CONF)
        if missing := missing_values(cfg):
            raise ValueError(
                f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value; "
                f"add {' '.join(f'{key}=…' for key in missing)}"
            )
        refuse_null_groups(cfg)
        from cleave.scripts.assembly.given import value_types  # imports torch: what stands above is told without

        value_types.check_values(cfg, CONF)
        heed_signals()
        quiet()
        return task(cfg)

    @wraps(task)
    def run(cfg: DictConfig) -> Any:
        import_projects()
        if sweeping():
            return run_job(checked, cfg)
        try:
            return checked(cfg)
        except Exception as error:
            if FULL_ERRORS or not is_users_mistake(error) or stopped_by(error):
                raise
            if isinstance(error, OSError):
                outlets.leave_if_failed(after=error)
            fail(error)

    return run


def missing_values(cfg: DictConfig) -> list[str]:
    """Keys of a config that still have no value, in order; values that lean on them are left out."""

    def search(node: Any, at: str) -> list[str]:
        if isinstance(node, dict):
            return [key for name, value in node.items() for key in search(value, f"{at}.{name}" if at else str(name))]
        return [at] if node == "???" else []

    return sorted(search(OmegaConf.to_container(cfg), ""))


def is_users_mistake(error: BaseException) -> bool:
    """Return whether an error is a sentence to the user, not a fault of the program."""
    if isinstance(error, ImportError):  # of a package that an extra brings, as Cleave says it, and of no other
        return type(error) is ImportError and OF_AN_EXTRA.search(str(error)) is not None
    return isinstance(error, USER_ERRORS) or type(error).__name__ == "MisconfigurationException"  # Lightning's


def heed_signals() -> None:
    """Let SIGTERM and Ctrl-C end the command in order from here on, where a run may have something to save."""
    from cleave.lightning_modules import signals

    if not signals.installed():
        signals.install()


def start(main: Callable[[], Any]) -> None:
    """Run a script; what Hydra itself refuses (a misspelt key, a folder it cannot write) is one line as well.

    SIGTERM and Ctrl-C end it with status 143 and 130, and a word on what is kept.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a trace
    # What gRPC's C++ prints of handshakes and ports stands before the sentence that says it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    outlets.fill()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _end_at_once)
    extend_hydra()
    sys.path.append(str(Path.cwd()))  # behind all else: a module of the user's imports by its name
    sys.argv[1:] = [paths.expanded_override(each) for each in sys.argv[1:]]
    try:
        _started(main)
    except SystemExit as end:
        # What was printed is written here, where it can still be said that it was not.
        outlets.leave_if_failed(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    outlets.leave_if_failed()


def _started(main: Callable[[], None]) -> None:
    try:
        main()
    except BaseException as error:
        if isinstance(error, OSError):
            outlets.leave_if_failed(after=error)
        told()
        if (stopped := stopped_by(error)) is not None:
            end(stopped)
        if isinstance(error, FailedJob):
            raise SystemExit(1) from None
        if FULL_ERRORS or not is_users_mistake(error):
            raise
        fail(error)
    if told():
        raise SystemExit(1)


def stopped_by(error: BaseException) -> Stopped | None:
    """Return the signal behind an exception, if there is one."""
    if "cleave.lightning_modules.signals" not in sys.modules:
        return None  # nothing heeds them yet
    from cleave.scripts.assembly.starting import stopping

    return stopping.stopped_by(error)


def _end_at_once(signum: int, frame: FrameType | None) -> None:
    """End while there is nothing yet to put in order."""
    name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
    outlets.complain(f"Stopped by {name}.\n{UNFINISHED}")
    raise SystemExit(128 + signum)


def end(stopped: Stopped) -> NoReturn:
    """Leave as a signal asked."""
    if stopped.speaks:
        if not getattr(stopped, "__notes__", []):
            stopped.add_note(UNFINISHED)
        outlets.failed()  # what was printed stands before it; what cannot be written is told in the end
        outlets.complain(stopped.in_words())
    raise SystemExit(stopped.code)


def unwrapped(error: BaseException) -> BaseException:
    """Return what a call of Hydra's raised in place of Hydra's own words around it."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return error


def fail(error: BaseException) -> None:
    """Print an error, unwrapped from Hydra's instantiation, and leave with exit status 1."""
    error = unwrapped(error)
    if isinstance(error, HydraException) and error.__cause__ is not None:
        error = type(error)(f"{error}\n{error.__cause__}")
    message = str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        name = Path(sys.argv[0]).stem.removeprefix("cleave-").replace("-", "_")
        message = unreadable(error, sys.argv[1:]) or keys.explained(message, name, CONF, sys.argv[1:])
    lines = [f"{type(error).__name__}: {message}{missing_extra(message)}", *getattr(error, "__notes__", [])]
    outlets.complain("\n".join([*lines, "HYDRA_FULL_ERROR=1 in front of the command shows where it arose"]))
    raise SystemExit(1)
