"""The name of a bundle, and its versions: folders whose names are numbers."""

from __future__ import annotations

import re
from pathlib import Path

from .files import MANIFEST, BundleError, check_name

_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def is_version(name: str) -> bool:
    """Whether a name, of a folder or in a request, is that of a version."""
    return _VERSION.fullmatch(name) is not None


def bundle_name(folder: Path) -> str:
    """Return the name of the bundle in a folder: the folder's own, or for a version of it that of the folder around."""
    absolute = folder.absolute()
    return absolute.parent.name if is_version(absolute.name) else absolute.name


def versions_in(folder: Path) -> dict[int, Path]:
    """Return the folders of versions that lie in a folder, the oldest first."""
    if not folder.is_dir():
        return {}
    inside = [each for each in folder.iterdir() if is_version(each.name) and not each.is_symlink()]
    return dict(sorted((int(each.name), each) for each in inside if (each / MANIFEST).is_file()))


def versions_of(folder: Path) -> tuple[str, dict[int, Path]]:
    """Return the name of the bundle in a folder, and the folders of its versions.

    ``NAME/manifest.json`` is version 1 of ``NAME``; ``NAME/3/manifest.json`` is its version 3, and where ``NAME/3`` is
    named, the only one.

    Raises:
        BundleError: There is no manifest, or the name cannot be served.
    """
    folder = Path(folder)
    name = folder.absolute().name
    if (folder / MANIFEST).is_file():
        found = {int(name) if is_version(name) else 1: folder}
        return check_name(bundle_name(folder), "the bundle's folder"), found
    if not (found := versions_in(folder)):
        raise BundleError(f"{folder} is no bundle: neither it nor a folder 1, 2, … in it holds a {MANIFEST}")
    return check_name(name, "the bundle's folder"), found
