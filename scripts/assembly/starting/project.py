"""A project of a user's own: a folder of configs, ``--config-dir``, and beside it the modules that they name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.search_path_plugin import SearchPathPlugin

PROVIDER = "command-line"
"""What Hydra calls the source of ``--config-dir``."""


class ProjectFirst(SearchPathPlugin):
    """Puts ``--config-dir`` before Cleave's own configs, behind which Hydra leaves it, and its parent on the path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Let the project's presets win, and say which ones do."""
        given, _ = get_args_parser().parse_known_args()
        if given.config_dir is None or not Path(given.config_dir).is_dir():
            return  # Hydra refuses what is no folder
        folder = Path(os.path.abspath(given.config_dir))  # noqa: PTH100 - as Hydra reads it, links and all
        ours = Path(__file__).resolve().parents[3] / "conf"
        if folder.resolve() == ours:
            return
        search_path.prepend(PROVIDER, f"file://{folder}", anchor="main")
        make_importable(folder)
        if (both := presets(folder) & presets(ours)) and not given.shell_completion and _speaks():
            names = ", ".join(sorted(both))
            print(f"{folder} has presets of Cleave's names, which are taken: {names}", file=sys.stderr)


def presets(folder: Path) -> set[str]:
    """Return the presets of a folder as ``group/name``."""
    return {file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")}


def project_folders() -> list[Path]:
    """Return the folder given as ``--config-dir``, inside of a job, as a list of none or one."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    paths = [source.path for source in sources if source.provider == PROVIDER and source.schema == "file"]
    return [Path(path) for path in dict.fromkeys(paths)]


def project_options() -> list[str]:
    """Return the words of a command line that bring this job's project along."""
    return [word for folder in project_folders() for word in ("--config-dir", short_path(folder))]


def short_path(path: Path) -> str:
    """Return a path as one would type it: from the working directory, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def import_projects() -> None:
    """Make a project's modules importable in a job, which a launcher may run in another process."""
    for folder in project_folders():
        make_importable(folder)


def make_importable(folder: Path) -> None:
    """Put the parent of a folder of configs at the end of the path."""
    if (parent := str(folder.parent)) not in sys.path:
        sys.path.append(parent)


def _speaks() -> bool:
    """Whether this is no further process that Lightning started for another device."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
