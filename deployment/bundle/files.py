"""Reading a bundle's files as from a stranger: inside the folder, of bounded length, and unchanged."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
from pathlib import Path

from ..checks import is_whole

MANIFEST = "manifest.json"
MAX_FILE_BYTES = 4 * 2**30
_MOST_WORDS = 4000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BundleError(ValueError):
    """A bundle that cannot be written, read or trusted; the message says what is wrong and where.

    Messages quote what they refuse, which may be as long as a file: they are cut to what a person can read.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message if len(message) <= _MOST_WORDS else f"{message[:_MOST_WORDS]} …")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can stand in a bundle's folder: letters, digits, ``_``, ``.`` and ``-``, no path.

    Raises:
        BundleError: It could lead elsewhere, or is hard to spell in a file system.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BundleError(
            f"{what} {name!r:.200} must be a plain name of letters, digits, '_', '.' and '-': "
            "a path could lead outside the bundle's folder"
        )
    return name


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of a bundle.

    Args:
        file: Its name in the bundle's folder.
        sha256: Digest of its content, 64 lower-case hexadecimal digits.
        bytes: Its length.
    """

    file: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        check_name(self.file, "the file")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise BundleError(f"the sha256 of {self.file} must be 64 hexadecimal digits, got {self.sha256!r}")
        if not is_whole(self.bytes) or not 0 < self.bytes <= MAX_FILE_BYTES:
            raise BundleError(f"{self.file} may have 1 to {MAX_FILE_BYTES} bytes, got {self.bytes}")

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Describe a file that was just written."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.name, digest, path.stat().st_size)


def read_file(directory: Path, name: str, limit: int, length: int | None = None) -> bytes:
    """Read a regular file that lies directly in a folder; nothing of it is read before its length is known to fit.

    Args:
        directory: The folder.
        name: The file's name.
        limit: Most bytes that it may have.
        length: The bytes that it must have, where they are known.

    Raises:
        BundleError: The name is a path, the file is missing, a link or no regular file, or of another length.
    """
    path = directory / check_name(name, "the file")
    try:
        # Opened without following a link and looked at afterwards, so that no swap in between is possible; without
        # blocking, so that a pipe in a file's place cannot hold the reader.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise BundleError(f"{path} is a symbolic link; a bundle's files lie in its own folder") from None
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise BundleError(f"{path} has {status.st_size} bytes, more than the {limit} allowed")
        if length not in (None, status.st_size):
            raise BundleError(f"{path} has {status.st_size} bytes, the manifest says {length}")
        content = file.read(status.st_size + 1)
    if len(content) != status.st_size:
        raise BundleError(f"{path} changed its length while it was read")
    return content


def read_verified(directory: Path, entry: FileEntry) -> bytes:
    """Read a file and return its content only if length and digest are those of its entry.

    Raises:
        BundleError: As :func:`read_file`, or the content has changed.
    """
    content = read_file(directory, entry.file, MAX_FILE_BYTES, entry.bytes)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleError(f"{directory / entry.file} has changed: its sha256 is not the manifest's")
    return content
