"""A word on a schedule that was made for another number of steps than a resumed run now has."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

TOTAL_STEPS = "total_steps"
_BEHIND = {
    "CosineAnnealingLR": "behind them the rate rises again",
    "OneCycleLR": "behind them it ends in an error",
}


class ResumedSchedule(pl.Callback):
    """Says, before a resumed run trains, what becomes of a schedule that the checkpoint holds.

    Lightning restores a schedule as it was made, so that a longer, shorter or otherwise divided run keeps the old one.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the steps that the schedule was made for with those of the run.

        Raises:
            ValueError: The schedule has no rate for the steps behind its end.
        """
        if not trainer.fit_loop.is_resuming:
            return
        factory: Any = getattr(getattr(pl_module, "settings", None), "scheduler", None)
        keys = [key for key, value in getattr(factory, "keywords", {}).items() if value == TOTAL_STEPS]
        steps = trainer.estimated_stepping_batches
        if not keys or not trainer.lr_scheduler_configs or not math.isfinite(steps):
            return
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        made_for = getattr(scheduler, keys[0], None)
        if not isinstance(made_for, int) or made_for == steps:
            return
        name = type(scheduler).__name__
        if steps > made_for and name == "OneCycleLR":
            raise ValueError(
                f"the checkpoint's OneCycleLR was made for {made_for} steps and has no rate behind them, but this run "
                f"has {int(steps)}; resume it with the settings it was made for, or start anew from its weights, "
                "base.ckpt_path=FILE"
            )
        end = _ends(name, steps > made_for)
        tell(f"{name} was made for {made_for} steps and stays so, this run has {int(steps)}: {end}")


def _ends(name: str, longer: bool) -> str:
    if not longer:
        return "training ends before the rate has come to its end"
    return _BEHIND.get(name, "behind them the rate stays where that schedule ends")


@rank_zero_only
def tell(message: str) -> None:
    """Print a line of a run."""
    print(message, flush=True)
