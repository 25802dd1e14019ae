"""What Hydra is told of before it reads a config: projects, the sweeper over Optuna, and names of commands in help."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from cleave.scripts.assembly.starting.optuna_sweeper import TARGET, OptunaSweeper
from cleave.scripts.assembly.starting.program import program
from cleave.scripts.assembly.starting.project import ProjectFirst

EXTRAS = {
    r"hydra/launcher/joblib": ("joblib", "hydra-joblib-launcher"),
    r"hydra/launcher/submitit": ("submitit", "hydra-submitit-launcher"),
}
"""Presets that other packages bring, and the extras that install these."""


def extend_hydra() -> None:
    """Register what is Cleave's own; the sweeper by the name that configs have, as Hydra takes no class of ours."""
    plugins = Plugins.instance()
    plugins.register(ProjectFirst)
    plugins.class_name_to_class[TARGET] = OptunaSweeper
    OmegaConf.register_new_resolver("program", program, replace=True)
    ConfigLoaderImpl.get_group_options = _group_options


_copying: Callable[..., list[str]] = ConfigLoaderImpl.get_group_options


def _group_options(
    loader: ConfigLoaderImpl,
    group_name: str,
    results_filter: ObjectType | None = ObjectType.CONFIG,
    config_name: str | None = None,
    overrides: list[str] | None = None,
) -> list[str]:
    """List the presets of a group as Hydra does, which copies all its sources for each group, most of ``--help``."""
    if config_name is not None or overrides:
        return _copying(loader, group_name, results_filter, config_name, overrides)
    repository: Any = loader.repository
    return repository.get_group_options(group_name, results_filter)


def missing_extra(message: str) -> str:
    """Return what to install where Hydra finds no preset of a launcher."""
    for pattern, (extra, package) in EXTRAS.items():
        if re.search(f"Could not find '{pattern}", message):
            return f"\nIt comes with the extra `{extra}`: pip install {package}"
    return ""
