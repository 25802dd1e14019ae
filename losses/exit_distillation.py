"""Distillation between exits: each learns from the labels and from an output that knows more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from cleave.losses.exit_weights import WeightedExits, at_least_single
from cleave.losses.knowledge_distillation import KnowledgeDistillationLoss

SOURCES = ("final", "next", "teacher")


class ExitDistillationLoss(WeightedExits):
    r"""Weighted sum over the exits of cross entropy and divergence from the softened output of a source.

    With the softened outputs :math:`q_j = \mathrm{softmax}(s_j / \tau)` of exit j and :math:`p_j` of its source,

    .. math:: L = \sum_{j=1}^{E} \lambda_j \, \frac{1}{B} \sum_{b=1}^{B}
        \alpha \, \mathrm{CE}(s_{j,b}, y_b) + (1 - \alpha) \, \tau^2 \, \mathrm{KL}(p_{j,b} \Vert q_{j,b}).

    What is summed is ``KnowledgeDistillationLoss``, eq. 3-4 of Matsubara, Levorato and Restuccia, "Split
    Computing and Early Exiting for Deep Learning Applications", 2022. The sources:

    - ``"final"``: the final classifier teaches every early exit. Phuong and Lampert, "Distillation-Based Training for
      Multi-Exit Architectures", 2019; Li, Zhang, Qi, Yang and Huang, "Improved Techniques for Training Adaptive Deep
      Networks", 2019.
    - ``"next"``: the exit behind it teaches each early exit.
    - ``"teacher"``: another network teaches every exit, the final classifier too.

    No gradient flows into a source. In the first two the final classifier, which nobody teaches, has the cross entropy
    alone, undiminished by α.

    Args:
        source: Whom the exits learn from.
        alpha: Weight of the cross entropy, in [0, 1].
        temperature: τ > 0; the larger, the softer both distributions.
        weights: λ of the exits as in :class:`~cleave.losses.JointExitLoss`: a preset, or one number per exit.
        start: What an early exit weighs at first with ``"shallow_deep"``, in [0, 1].

    Attributes:
        needs_teacher: Whether the logits of a teacher are needed.

    Shape:
        - logits: E outputs (B, K), unnormalised, or all in one tensor (E, B, K).
        - labels: (B,), int64 in 0..K-1.
        - teacher_logits: (B, K), unnormalised; looked at with ``"teacher"`` only.
        - output: the weighted loss of each exit by its name, scalars in nats, float32 at least.

    Raises:
        ValueError: An argument is out of its range, the teacher's logits are missing or of another shape, or the
            weights do not fit the number of exits.

    Example:
        >>> import torch
        >>> logits = [torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])]
        >>> objective = ExitDistillationLoss("final", alpha=0.5, temperature=2.0)
        >>> objective.bind(["layer1", "final"])
        >>> objective(logits, torch.tensor([0]))
        {'layer1': tensor(0.5685), 'final': tensor(0.1269)}
    """

    def __init__(
        self,
        source: str = "final",
        alpha: float = 0.5,
        temperature: float = 4.0,
        weights: str | Sequence[float] = "equal",
        start: float = 0.01,
    ) -> None:
        super().__init__(weights, start)
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
        self.source = source
        self.distillation = KnowledgeDistillationLoss(alpha, temperature)

    @property
    def needs_teacher(self) -> bool:
        """Whether the logits of a teacher are needed."""
        return self.source == "teacher"

    def forward(
        self, logits: Sequence[Tensor], labels: Tensor, progress: float = 1.0, teacher_logits: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted loss of each exit by its name; their sum is what is minimised.

        Args:
            logits: The exits' outputs.
            labels: The labels.
            progress: Share of the training that is done, in [0, 1].
            teacher_logits: The teacher's output for the same images, where ``needs_teacher``.
        """

        def loss(j: int) -> Tensor:
            source = self._source(j, logits, teacher_logits)
            if source is None:
                return F.cross_entropy(at_least_single(logits[j]), labels)
            return self.distillation(logits[j], source, labels)

        return self.weigh(logits, loss, progress)

    def _source(self, j: int, logits: Sequence[Tensor], teacher_logits: Tensor | None) -> Tensor | None:
        """Return what exit j learns from, None where from the labels alone."""
        if self.source == "teacher":
            if teacher_logits is None:
                raise ValueError(
                    "source='teacher' needs teacher_logits, got None; pass what the teacher says of the batch"
                )
            return teacher_logits
        if j == len(logits) - 1:
            return None
        return logits[-1] if self.source == "final" else logits[j + 1]

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"source={self.source!r}, {super().extra_repr()}"
