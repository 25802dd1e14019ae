"""How a command starts and ends: a user's mistakes as one line, quiet frameworks, signals."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from cleave.lightning_modules import signals
from cleave.lightning_modules.signals import Stopped
from cleave.scripts.assembly.given import keys, paths
from cleave.scripts.assembly.logs import quiet
from cleave.scripts.assembly.stopping import stopped_by
from cleave.scripts.assembly.sweeps import FailedJob, run_job, sweeping, told

CONF = str(Path(__file__).resolve().parents[2] / "conf")
FULL_ERRORS = os.environ.get("HYDRA_FULL_ERROR") == "1"
USER_ERRORS = (ValueError, TypeError, OSError, HydraException, OmegaConfBaseException, MisconfigurationException)


def friendly(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Turn a user's mistake into one line and exit status 1; ``HYDRA_FULL_ERROR=1`` shows where it arose.

    A config value that is still missing is named before anything is built. A job of a sweep fails alone.
    """

    def checked(cfg: DictConfig) -> Any:
        from cleave.scripts.assembly.given import value_types

        paths.settle(cfg)
        keys.check_added(cfg, CONF)
        if missing := missing_values(cfg):
            raise ValueError(
                f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value; "
                f"add {' '.join(f'{key}=…' for key in missing)}"
            )
        value_types.check_values(cfg, CONF)
        return task(cfg)

    @wraps(task)
    def run(cfg: DictConfig) -> Any:
        quiet()
        if sweeping():
            return run_job(checked, cfg)
        try:
            return checked(cfg)
        except USER_ERRORS as error:
            if FULL_ERRORS or signals.received() is not None:
                raise
            fail(error)

    return run


def missing_values(cfg: DictConfig) -> list[str]:
    """Keys of a config that still have no value, in order; values that lean on them are left out."""

    def search(node: Any, at: str) -> list[str]:
        if isinstance(node, dict):
            return [key for name, value in node.items() for key in search(value, f"{at}.{name}" if at else str(name))]
        return [at] if node == "???" else []

    return sorted(search(OmegaConf.to_container(cfg), ""))


def start(main: Callable[[], Any]) -> None:
    """Run a script; what Hydra itself refuses (a misspelt key, a folder it cannot write) is one line as well.

    SIGTERM and Ctrl-C end it with status 143 and 130, and a word on what is kept.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a trace
    signals.install()
    sys.path.append(str(Path.cwd()))  # behind all else: a module of the user's imports by its name
    sys.argv[1:] = [paths.expanded_override(each) for each in sys.argv[1:]]
    try:
        main()
    except BaseException as error:
        told()
        if (stopped := stopped_by(error)) is not None:
            end(stopped)
        if isinstance(error, FailedJob):
            raise SystemExit(1) from None
        if FULL_ERRORS or not isinstance(error, USER_ERRORS):
            raise
        fail(error)
    if told():
        raise SystemExit(1)


def end(stopped: Stopped) -> NoReturn:
    """Leave as a signal asked."""
    if stopped.speaks:
        if not getattr(stopped, "__notes__", []):
            stopped.add_note("It did not finish; what it reads is as it was, and the same command starts it again.")
        sys.stdout.flush()
        print(stopped.in_words(), file=sys.stderr, flush=True)
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
        message = keys.explained(message, Path(sys.argv[0]).stem.removeprefix("cleave-"), CONF, sys.argv[1:])
    print(f"{type(error).__name__}: {message}", file=sys.stderr)
    print("HYDRA_FULL_ERROR=1 in front of the command shows where it arose", file=sys.stderr)
    raise SystemExit(1)
