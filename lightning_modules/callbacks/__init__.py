"""Callbacks: the progress bar, what checkpoints carry, and what W&B keeps."""

from lightning_modules.callbacks.best import BestCheckpoint
from lightning_modules.callbacks.last import LastCheckpoint
from lightning_modules.callbacks.metadata import CheckpointMetadata
from lightning_modules.callbacks.progress import ProgressBar
from lightning_modules.callbacks.tracking import WandbTracking

__all__ = ["BestCheckpoint", "CheckpointMetadata", "LastCheckpoint", "ProgressBar", "WandbTracking"]
