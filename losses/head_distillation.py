"""Head-network distillation: the student's head mimics the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadDistillationLoss(nn.Module):
    r"""Squared error between the features of student and teacher, summed per sample and averaged over the batch.

    .. math:: L = \frac{1}{B} \sum_{b=1}^{B} \lVert s_b - t_b \rVert_2^2

    The sum per sample is the objective of head-network distillation (Matsubara et al., "Distilled Split Deep Neural
    Networks for Edge-Assisted Real-Time Systems", 2019; eq. 6 of Matsubara, Levorato and Restuccia, "Split Computing
    and Early Exiting for Deep Learning Applications", 2022); the mean over the batch keeps the rate of the optimizer
    independent of the batch size.

    Shape:
        - student: (B, ...), the decoder's output at the split.
        - teacher: (B, ...), the teacher's features there; no gradient flows into it.
        - output: scalar, in squared units of the features.

    Raises:
        ValueError: The two shapes differ.

    Example:
        >>> import torch
        >>> HeadDistillationLoss()(torch.ones(2, 3), torch.zeros(2, 3))
        tensor(3.)
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of a batch."""
        if student.shape != teacher.shape:
            raise ValueError(
                f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} differ in shape; "
                "both must come from the same cut and the same image size"
            )
        # A sum of this many squares does not fit half precision.
        dtype = torch.promote_types(student.dtype, torch.float32)
        return F.mse_loss(student.to(dtype), teacher.detach().to(dtype), reduction="sum") / len(student)
