"""Callbacks: the progress bar, what checkpoints carry, how far a fit came, and what W&B keeps."""

from lightning_modules.callbacks.best import BestCheckpoint
from lightning_modules.callbacks.early_stopping import EarlyStopping
from lightning_modules.callbacks.last import LastCheckpoint
from lightning_modules.callbacks.metadata import CheckpointMetadata
from lightning_modules.callbacks.progress import ProgressBar
from lightning_modules.callbacks.record import FitRecord
from lightning_modules.callbacks.stage import StageMarker
from lightning_modules.callbacks.tracking import WandbTracking

__all__ = [
    "BestCheckpoint",
    "CheckpointMetadata",
    "EarlyStopping",
    "FitRecord",
    "LastCheckpoint",
    "ProgressBar",
    "StageMarker",
    "WandbTracking",
]
