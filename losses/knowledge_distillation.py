"""Knowledge distillation: the student learns from the labels and from the teacher's softened outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIRECTIONS = ("teacher_student", "student_teacher")


class KnowledgeDistillationLoss(nn.Module):
    r"""Cross entropy with the labels, and Kullback-Leibler divergence between the softened outputs of two networks.

    With the student's distribution :math:`q = \mathrm{softmax}(s / \tau)` and the teacher's
    :math:`p = \mathrm{softmax}(t / \tau)`,

    .. math:: L = \frac{1}{B} \sum_{b=1}^{B} \alpha \, \mathrm{CE}(s_b, y_b) + (1 - \alpha) \, \tau^2 \, \mathrm{KL}_b,

    eq. 3-4 of Matsubara, Levorato and Restuccia, "Split Computing and Early Exiting for Deep Learning Applications",
    2022. They print KL(q, p), the student's distribution first; Hinton, Vinyals and Dean, "Distilling the Knowledge in
    a Neural Network", 2015, minimise the teacher's cross entropy, which is KL(p‖q) up to a constant. The factor τ²
    keeps the gradient of the second term as large as that of the first, whatever the temperature.

    A term whose weight is exactly 0 is not computed, so that neither its cost nor its NaNs arise.

    Args:
        alpha: Weight of the cross entropy, in [0, 1].
        temperature: τ > 0; the larger, the softer both distributions.
        direction: ``"teacher_student"`` for Hinton's KL(p‖q), ``"student_teacher"`` for the survey's KL(q‖p).

    Shape:
        - student_logits: (B, K), unnormalised.
        - teacher_logits: (B, K), unnormalised; no gradient flows into them.
        - labels: (B,), int64 in 0..K-1.
        - output: scalar, in nats.

    Raises:
        ValueError: An argument is out of its range, or the two logits differ in shape.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> KnowledgeDistillationLoss(alpha=0.5, temperature=2.0)(student, teacher, torch.tensor([0]))
        tensor(0.9877)
    """

    def __init__(self, alpha: float = 0.5, temperature: float = 4.0, direction: str = "teacher_student") -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}; it is the share of the cross entropy")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a positive finite number, got {temperature}; 1 softens nothing")
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        self.alpha = alpha
        self.temperature = temperature
        self.direction = direction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        _check_logits(student_logits, teacher_logits)
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
        if self.alpha == 1:
            return F.cross_entropy(student, labels)
        distillation = self.temperature**2 * self._divergence(student, teacher)
        if self.alpha == 0:
            return distillation
        return self.alpha * F.cross_entropy(student, labels) + (1 - self.alpha) * distillation

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q = F.log_softmax(student / self.temperature, dim=1)
        log_p = F.log_softmax(teacher / self.temperature, dim=1)
        first, second = (log_p, log_q) if self.direction == "teacher_student" else (log_q, log_p)
        # torch takes the divergence's second distribution first.
        return F.kl_div(second, first, reduction="batchmean", log_target=True)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"alpha={self.alpha}, temperature={self.temperature}, direction={self.direction!r}"


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    if student.shape == teacher.shape and student.ndim == 2:
        return
    shapes = f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}"
    if student.ndim == teacher.ndim == 2 and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{shapes}: the teacher has another number of classes than the student; "
            "take a teacher that was trained on the same classes"
        )
    raise ValueError(f"{shapes} must both be (B, K), from the same batch of images")
