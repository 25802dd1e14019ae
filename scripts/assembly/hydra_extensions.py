"""What Hydra is told of before it reads a config: projects, the sweeper over Optuna, and names of commands in help."""

from __future__ import annotations

import re

from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from cleave.scripts.assembly.optuna_sweeper import TARGET, OptunaSweeper
from cleave.scripts.assembly.program import program
from cleave.scripts.assembly.project import ProjectFirst

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


def missing_extra(message: str) -> str:
    """Return what to install where Hydra finds no preset of a launcher."""
    for pattern, (extra, package) in EXTRAS.items():
        if re.search(f"Could not find '{pattern}", message):
            return f"\nIt comes with the extra `{extra}`: pip install {package}"
    return ""
