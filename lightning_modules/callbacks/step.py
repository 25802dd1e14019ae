"""The step of a recipe in everything that is logged."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback


class StepMarker(Callback):
    """Logs the number of the step beside each metric of training and validation, as Lightning does the epoch.

    Args:
        number: The step's place in the recipe, from 1.
    """

    def __init__(self, number: int) -> None:
        self.number = float(number)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Mark what a step logs."""
        pl_module.log("recipe_step", self.number)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark what validation logs."""
        pl_module.log("recipe_step", self.number, sync_dist=True)  # the same everywhere, but else Lightning warns
