"""What frameworks log: to the log file, and to the terminal what a person has asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

FRAMEWORKS = ("pytorch_lightning", "lightning_fabric")
_ASKED_FOR = {"callbacks", "profilers"}
"""Folders of Lightning that log nothing unless asked to: a profiler's report, a summary, why a run stopped."""


def quiet() -> None:
    """Keep what frameworks say to themselves off the terminal; their warnings and errors stay.

    It goes to the log file of the run, and with ``hydra.verbose`` to the terminal as well.
    """
    for name in FRAMEWORKS:
        _hand_over(logging.getLogger(name))
    # Lightning 2.6 asks torch 2.15 about trees in a form torch is about to drop; no user can mend that.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).* is deprecated", FutureWarning)
    # A run shorter than the interval still logs at the end of each epoch.
    warnings.filterwarnings("ignore", r"The number of training batches .* is smaller than the logging interval")


def _hand_over(logger: logging.Logger) -> None:
    """Let the handlers of Hydra's log have what a framework logs, or else its own, with what was asked for alone."""
    root = logging.getLogger()
    if HydraConfig.initialized() and root.handlers:
        logger.handlers.clear()
        logger.propagate = True
        if logger.level > logging.DEBUG:  # else hydra.verbose names it
            logger.setLevel(logging.NOTSET)
    verbose = HydraConfig.get().verbose if HydraConfig.initialized() else False
    if verbose is True or any(f"{name}.".startswith(f"{logger.name}.") for name in _named(verbose)):
        return
    for handler in _terminals([*root.handlers, *logger.handlers]):
        if not any(isinstance(each, _AskedFor) and each.name == logger.name for each in handler.filters):
            handler.addFilter(_AskedFor(logger.name))


def _named(verbose: Any) -> list[str]:
    """Return the loggers that ``hydra.verbose`` names."""
    return [verbose] if isinstance(verbose, str) else [] if isinstance(verbose, bool) else list(verbose)


def _terminals(handlers: Iterable[logging.Handler]) -> list[logging.StreamHandler]:
    return [each for each in handlers if type(each) is logging.StreamHandler]


class _AskedFor(logging.Filter):
    """Lets through what is no framework's, warnings, and what was asked for."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record may pass."""
        its_own = record.name.partition(".")[0] == self.name
        return not its_own or record.levelno >= logging.WARNING or Path(record.pathname).parent.name in _ASKED_FOR
