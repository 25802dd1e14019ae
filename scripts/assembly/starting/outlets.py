"""Where a command prints to: a pipe that nobody reads any more, a disk that is full."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

CLOSED = 141
"""Exit status of a command whose reader has gone, as a shell sees it of Unix tools: 128 and SIGPIPE."""

# What a write may fail with; none of them names a file.
_OF_WRITING = (errno.EPIPE, errno.ESHUTDOWN, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Outlets:
    """Whether this command goes on where nobody reads what it prints."""

    goes_on = False


def go_on() -> None:
    """Go on from here where nobody reads what is printed: a server has others than its terminal to answer."""
    _Outlets.goes_on = True


def fill() -> None:
    """Put something in the place of outlets that the shell has closed (`>&-`), which no file may take for its own."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the end
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def unread() -> Iterator[None]:
    """Print within to whoever reads it, and go on where nobody does or no disk holds it."""
    try:
        yield
    except OSError as error:
        drop(error)


def failed(after: OSError | None = None) -> OSError | None:
    """Return what keeps standard output from being written, if anything does; what it still holds is written else.

    Args:
        after: An error that may come from there. Where a stream holds nothing back, nothing else tells.
    """
    return _failure(sys.stdout, after)


def _failure(stream: TextIO | None, after: OSError | None) -> OSError | None:
    try:
        if stream is not None:  # as it is where a shell has closed it
            stream.flush()
            if after is not None and after.filename is None and after.errno in _OF_WRITING:
                os.write(stream.fileno(), b"\n")
    except OSError as error:
        return error
    except ValueError:  # closed by this process itself
        return None
    return None


def drop(after: OSError | None = None) -> None:
    """Send nowhere what standard output still holds, and all that it is given from now on, if it fails.

    Args:
        after: An error that may come from there.
    """
    if _failure(sys.stdout, after) is not None:
        _sink(sys.stdout)


def _sink(stream: TextIO) -> None:
    # Neither the stream, which others hold, nor what it holds can be replaced; what lies below it can.
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def leave_if_failed(status: int = 0, after: OSError | None = None) -> None:
    """End where standard output cannot be written: quietly where its reader has gone, else with the reason.

    Args:
        status: The exit status that there would be otherwise.
        after: An error that may come from there.

    Raises:
        SystemExit: It cannot.
    """
    error = failed(after)
    if error is None:
        return
    drop(error)
    if error.errno in (errno.EPIPE, errno.ESHUTDOWN):
        raise SystemExit(status or CLOSED) from None
    complain(f"{type(error).__name__}: what this command prints cannot be written: {error.strerror or error}")
    raise SystemExit(status or 1) from None


def complain(words: str) -> None:
    """Print to standard error, if anybody reads it."""
    try:
        print(words, file=sys.stderr, flush=True)
    except OSError:
        _sink(sys.stderr)


def heed(handlers: Iterable[logging.Handler]) -> None:
    """Let handlers of a log treat what cannot be written as all else that is printed, instead of printing a trace."""
    for handler in handlers:
        if isinstance(handler, logging.StreamHandler):
            treat = _of_a_file if isinstance(handler, logging.FileHandler) else _of_a_terminal
            handler.handleError = treat  # type: ignore[method-assign]


def _of_a_terminal(record: logging.LogRecord) -> None:
    error = sys.exception()
    if not isinstance(error, OSError):
        _trace(record)
    elif _Outlets.goes_on:
        drop(error)
    else:
        raise error


def _of_a_file(record: logging.LogRecord) -> None:
    error = sys.exception()
    if isinstance(error, OSError):
        complain(f"The log file cannot be written: {error.strerror or error}")
    else:
        _trace(record)


def _trace(record: logging.LogRecord) -> None:
    logging.Handler().handleError(record)
