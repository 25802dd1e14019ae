"""What SIGTERM and Ctrl-C do to a command: it ends with status 143 or 130, behind what has to be finished first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pytorch_lightning.utilities import rank_zero_only

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Ends the program as a signal asked; its notes say what is kept.

    Attributes:
        checkpoint: What was saved for it.

    Args:
        signum: The signal.
        speaks: Whether this process tells; the others of a run end without a word, and with status 0, as Lightning
            takes any other for a crash.
    """

    def __init__(self, signum: int, speaks: bool = True) -> None:
        super().__init__(128 + signum if speaks else 0)
        self.signum, self.speaks = signum, speaks
        self.checkpoint: str | None = None

    def in_words(self) -> str:
        """Return what a person should know."""
        return "\n".join([f"Stopped by {name_of(self.signum)}.", *getattr(self, "__notes__", [])])


class _Waiting:
    """The signals of this process that were received, and what defers them."""

    owner: int | None = None
    received: int | None = None
    deferred: Callable[[int], None] | None = None
    at_once: Callable[[], None] | None = None


def name_of(signum: int) -> str:
    """Return a signal's name as people know it."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def install() -> None:
    """Let SIGTERM and Ctrl-C raise :class:`Stopped` in this process from now on."""
    _Waiting.owner, _Waiting.received, _Waiting.deferred, _Waiting.at_once = os.getpid(), None, None, None
    take_back()


def take_back() -> None:
    """Handle the signals again where something else, such as Lightning, has put its own handler before this one."""
    if installed() and threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, _handle)


def installed() -> bool:
    """Return whether the signals of this process are handled here: a library leaves them to the program."""
    return _Waiting.owner == os.getpid()


def received() -> int | None:
    """Return the signal that asked this process to end."""
    return _Waiting.received if installed() else None


def speaks() -> bool:
    """Return whether this process is the one of a run that tells."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def deferring(told: Callable[[int], None], at_once: Callable[[], None] | None = None) -> Iterator[None]:
    """Only note a signal within; whoever asks :func:`received` must end then. A second one of a kind ends at once.

    Args:
        told: Called with the first signal, such as to say what is waited for.
        at_once: Called before the process ends at once.
    """
    defer(told, at_once)
    try:
        yield
    finally:
        defer(None)


def defer(told: Callable[[int], None] | None, at_once: Callable[[], None] | None = None) -> None:
    """Begin to note signals only, or, with ``None``, let them raise again; see :func:`deferring`."""
    _Waiting.deferred, _Waiting.at_once = told, at_once


def _handle(signum: int, frame: FrameType | None) -> None:
    if not installed():  # a worker forked from here: the process itself says when it ends
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    if signum == _Waiting.received:
        _end(signum)
    first, _Waiting.received = _Waiting.received is None, signum
    if _Waiting.deferred is None:
        raise Stopped(signum, speaks=speaks())
    if first:
        with suppress(OSError):  # where nobody reads what is said, all the same ends in order
            _Waiting.deferred(signum)


def _end(signum: int) -> None:
    with suppress(Exception):
        if _Waiting.at_once is not None:
            _Waiting.at_once()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(128 + signum)
