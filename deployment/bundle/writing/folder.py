"""The folder of a new bundle: beside its target until all is written, then in its place."""

from __future__ import annotations

import contextlib
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..files import MANIFEST, BundleError

_SUFFIXES = (".pt", ".safetensors")


def check_target(directory: str | Path, overwrite: bool = False) -> None:
    """Raise :class:`BundleError` unless a bundle can be written to ``directory``; ask before a long computation."""
    with new_folder(Path(directory), overwrite, keep=False):
        pass


@contextlib.contextmanager
def new_folder(directory: Path, overwrite: bool, keep: bool = True) -> Iterator[Path]:
    """Yield a folder beside ``directory`` that takes its place if all went well, and is removed otherwise."""
    folder, made = None, []
    try:
        try:
            _check_replaceable(directory, overwrite)
            made = [parent for parent in directory.parents if not parent.exists()]
            directory.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        except OSError as error:
            raise BundleError(f"cannot write to {directory}: {error.strerror}") from error
        yield folder
        if keep:
            _move(folder, directory)
            made = []
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _check_replaceable(directory: Path, overwrite: bool) -> None:
    if files := [parent for parent in directory.parents if parent.exists() and not parent.is_dir()]:
        raise BundleError(f"cannot write to {directory}: {files[0]} is a file")
    if directory.is_symlink():
        raise BundleError(f"{directory} is a symbolic link; name the folder itself")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise BundleError(f"{directory} is a file; a bundle is a folder")
    names = sorted(path.name for path in directory.iterdir())
    ours = (MANIFEST, *(name for name in names if name.endswith(_SUFFIXES))) if MANIFEST in names else ()
    if other := [name for name in names if name not in ours]:
        raise BundleError(f"{directory} holds {other[0]}, which no export wrote; name a new or an empty folder")
    if names and not overwrite:
        raise BundleError(f"{directory} is a bundle already; replace it with overwrite=true, or name another folder")


def _move(folder: Path, directory: Path) -> None:
    """Give ``folder`` the name ``directory``; a bundle that has it is put aside until that has worked."""
    # A temporary folder is private; a bundle is as open as any other folder its owner makes. What that is, a folder
    # tells: the process's mask can be read only by changing it.
    ordinary = folder / "ordinary"
    ordinary.mkdir()
    folder.chmod(stat.S_IMODE(ordinary.stat().st_mode))
    ordinary.rmdir()
    aside = folder.with_name(folder.name + ".old")
    try:
        if directory.exists():
            directory.rename(aside)
        try:
            folder.rename(directory)
        except OSError:
            if aside.exists():
                aside.rename(directory)
            raise
    except OSError as error:
        raise BundleError(f"cannot write to {directory}: {error.strerror}") from error
    shutil.rmtree(aside, ignore_errors=True)
