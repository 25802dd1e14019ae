"""The settings of an attack, checked as far as they can be before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig

from cleave.architectures.attacking.decoders import FAMILIES, STRENGTHS
from cleave.lightning_modules.attacking.training import Schooling
from cleave.scripts.assembly.attacking.checks import check_device, each, listed, one_source, releases, whole
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.exits_settings import number
from cleave.scripts.assembly.networks import keyed

RAW, LOGITS, UNAWARE = "raw", "logits", "unaware"
CONTROLS = (RAW, LOGITS, UNAWARE)
_WHOLE = {
    "targets.images": True,
    "attack.images": True,
    "white_box.steps": False,
    "resamples": False,
    "information.epochs": False,
    "information.batch": False,
}


def checked(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings as plain values, lists where one stands alone.

    Raises:
        ValueError: A value is none of those that it may be.
    """
    settings = plain(cfg)
    one_source(settings)
    attack, white = settings["attack"], settings["white_box"]
    attack["families"] = listed("attack.families", attack["families"], FAMILIES)
    attack["strengths"] = listed("attack.strengths", attack["strengths"], STRENGTHS)
    settings["controls"] = listed("controls", settings["controls"], CONTROLS, empty=True)
    for key, all_of_them in _WHOLE.items():
        whole(settings, key, nullable=all_of_them)
    whole(settings, "seed", least=0)
    attack["releases"] = releases(attack["releases"])
    white["tv"] = each(white["tv"])
    for weight in white["tv"]:
        if not number(weight) or not 0 <= weight < math.inf:
            raise ValueError(f"white_box.tv must be numbers of at least 0, got {weight!r}")
    if not white["tv"]:
        raise ValueError("white_box.tv is empty; give at least one weight, such as 0")
    if not number(white["lr"]) or not 0 < white["lr"] < math.inf:
        raise ValueError(f"white_box.lr must be above 0, such as 0.05, got {white['lr']!r}")
    _check_choices(settings)
    with keyed("attack", attack):
        settings["schooling"] = Schooling(attack["epochs"], attack["batch_size"], attack["lr"], settings["seed"])
    return settings


def _check_choices(settings: dict[str, Any]) -> None:
    white, pictures = settings["white_box"]["use"], settings["pictures"]
    if white not in (None, True, False):
        raise ValueError(f"white_box.use must be true, false or null, got {white!r}")
    if white and settings["bundle"] is not None:
        raise ValueError(
            f"white_box.use=true needs gradients, which a bundle has none of, got bundle={settings['bundle']}; give "
            "the checkpoint it was exported from by ckpt_path=FILE, or leave white_box.use out"
        )
    if not isinstance(settings["targets"]["leave_out_seen"], bool):
        raise ValueError(f"targets.leave_out_seen must be true or false, got {settings['targets']['leave_out_seen']!r}")
    if not isinstance(settings["information"]["use"], bool):
        raise ValueError(f"information.use must be true or false, got {settings['information']['use']!r}")
    if settings["information"]["batch"] < 4:
        raise ValueError(
            f"information.batch must be at least 4, which a bias-corrected distance correlation needs, got "
            f"{settings['information']['batch']}"
        )
    if isinstance(pictures, bool) or not isinstance(pictures, int) or not 0 <= pictures <= 32:
        raise ValueError(f"pictures must be a whole number from 0 to 32, got {pictures!r}")
    if settings["judge"]["layer"] is not None and settings["judge"]["ckpt_path"] is None:
        raise ValueError(f"judge.layer={settings['judge']['layer']} is a layer of judge.ckpt_path=FILE; give it too")
    check_device(settings["device"])
