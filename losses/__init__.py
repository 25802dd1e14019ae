"""Pure objectives: tensors in, scalar out."""

from losses.head_distillation import HeadDistillationLoss

__all__ = ["HeadDistillationLoss"]
