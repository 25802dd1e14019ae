"""Training and evaluation logic: one thin module per family of methods."""

from lightning_modules.base import Task
from lightning_modules.classification import Classification
from lightning_modules.head_distillation import HeadDistillation
from lightning_modules.split import SplitTask
from lightning_modules.teacher import Teacher

__all__ = ["Classification", "HeadDistillation", "SplitTask", "Task", "Teacher"]
