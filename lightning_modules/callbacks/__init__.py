"""Callbacks: the guard, the progress bar, what checkpoints carry, how far a fit came, and what W&B keeps."""

from cleave.lightning_modules.callbacks.best import BestCheckpoint
from cleave.lightning_modules.callbacks.early_stopping import EarlyStopping
from cleave.lightning_modules.callbacks.guard import Guard
from cleave.lightning_modules.callbacks.last import LastCheckpoint
from cleave.lightning_modules.callbacks.metadata import CheckpointMetadata
from cleave.lightning_modules.callbacks.progress import ProgressBar
from cleave.lightning_modules.callbacks.record import FitRecord
from cleave.lightning_modules.callbacks.schedule import ResumedSchedule
from cleave.lightning_modules.callbacks.step import StepMarker
from cleave.lightning_modules.callbacks.tracking import WandbTracking

__all__ = [
    "BestCheckpoint",
    "CheckpointMetadata",
    "EarlyStopping",
    "FitRecord",
    "Guard",
    "LastCheckpoint",
    "ProgressBar",
    "ResumedSchedule",
    "StepMarker",
    "WandbTracking",
]
