"""What Weights & Biases keeps of a run beyond its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only


class WandbTracking(Callback):
    """Logs the best checkpoint as an artifact and a table of test predictions, online and offline alike.

    Without a ``WandbLogger`` among the trainer's loggers it does nothing.

    Args:
        predictions: Rows of the prediction table, the first images of the test set; 0 for none.
    """

    def __init__(self, predictions: int = 32) -> None:
        self.predictions = predictions

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the best checkpoint."""
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if path and (run := wandb_run(trainer)):
            log_artifact(run, Path(path), kind="model", name="checkpoint")

    @rank_zero_only
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a table of images, labels, predictions and confidences."""
        run = wandb_run(trainer)
        if run is None or not self.predictions or trainer.datamodule is None:
            return
        import wandb

        images, labels = trainer.datamodule.sample_images("test", self.predictions)
        with torch.no_grad():
            normalized = trainer.datamodule.input.normalize(images.to(pl_module.device))
            confidence, predicted = pl_module(normalized).float().softmax(1).max(1)
        names = pl_module.class_names
        table = wandb.Table(columns=["image", "label", "prediction", "confidence", "correct"])
        for image, label, guess, sure in zip(
            images, labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True
        ):
            pixels = image.permute(1, 2, 0).cpu().numpy()
            picture = wandb.Image(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
            table.add_data(picture, names[label], names[guess], sure, label == guess)
        run.log({"test/predictions": table})


def wandb_run(trainer: pl.Trainer) -> Any | None:
    """Return the W&B run of the trainer's ``WandbLogger``, or ``None`` where it has none."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            return logger.experiment
    return None


def log_artifact(run: Any, path: Path, kind: str, name: str) -> None:
    """Log a file or a folder as the artifact ``NAME-<run id>``; W&B uploads it when it is online."""
    import wandb

    artifact = wandb.Artifact(f"{name}-{run.id}", type=kind)
    if path.is_dir():
        artifact.add_dir(str(path))
    else:
        artifact.add_file(str(path))
    run.log_artifact(artifact)
