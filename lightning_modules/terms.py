"""The weighted terms that an objective is made of, and what each of them looks at."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping

from torch import Tensor, nn

from cleave.architectures.cutting.stages import LOGITS
from cleave.architectures.split import HEAD, LIKELIHOODS, LOG_VARIANCE, MEAN


@dataclasses.dataclass(frozen=True)
class Seen:
    """What student and teacher made of a batch.

    Args:
        labels: (B,), int64.
        student: Outputs of the student that some term asked for, by name.
        teacher: Outputs of the teacher, by name, without a graph.
    """

    labels: Tensor
    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]


class Term(nn.Module, abc.ABC):
    """One weighted term of an objective.

    Args:
        objective: The loss that it computes.
        weight: Factor on the loss, at least 0.

    Attributes:
        student: Names that it asks of :meth:`cleave.architectures.SplitNetwork.features`.
        teacher: Names that it asks of the teacher, :meth:`cleave.architectures.Stages.features`.

    Raises:
        ValueError: ``weight`` is negative or not finite.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()

    def __init__(self, objective: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of a term must be a number of at least 0, got {weight}")
        self.objective = objective
        self.weight = weight

    @abc.abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Return the unweighted loss."""

    def named(self, name: str, seen: Seen) -> dict[str, Tensor]:
        """Return the weighted loss under a name; a term of several parts returns each."""
        return {name: self.weight * self(seen)}


class LabelTerm(Term):
    """The student's logits against the labels: cross entropy."""

    student = (LOGITS,)

    def forward(self, seen: Seen) -> Tensor:
        """Return the unweighted loss."""
        return self.objective(seen.student[LOGITS].float(), seen.labels)


class LogitsTerm(Term):
    """The student's logits against the teacher's and the labels: knowledge distillation."""

    student = teacher = (LOGITS,)

    def forward(self, seen: Seen) -> Tensor:
        """Return the unweighted loss."""
        return self.objective(seen.student[LOGITS], seen.teacher[LOGITS], seen.labels)


class FeatureTerm(Term):
    """The student's feature at one layer against the teacher's.

    Args:
        objective: As of :class:`Term`.
        at: Name of the layer: the split, or one of ``split.observe``.
        weight: As of :class:`Term`.
    """

    def __init__(self, objective: nn.Module, at: str, weight: float = 1.0) -> None:
        super().__init__(objective, weight)
        self.at = at
        self.student = self.teacher = (at,)

    def forward(self, seen: Seen) -> Tensor:
        """Return the unweighted loss."""
        return self.objective(seen.student[self.at], seen.teacher[self.at])


class FeaturesTerm(Term):
    """Features at several layers against the teacher's, each with its own weight λ and logged by its layer's name.

    Args:
        objective: A :class:`cleave.losses.GeneralizedHeadDistillationLoss`, which names the layers.
        weight: As of :class:`Term`.
    """

    def __init__(self, objective: nn.Module, weight: float = 1.0) -> None:
        super().__init__(objective, weight)
        self.student = self.teacher = tuple(objective.weights)  # type: ignore[arg-type]

    def forward(self, seen: Seen) -> Tensor:
        """Return the unweighted loss."""
        return self.objective(seen.student, seen.teacher)

    def named(self, name: str, seen: Seen) -> dict[str, Tensor]:
        """Return the weighted loss of each layer."""
        terms = self.objective.terms(seen.student, seen.teacher)  # type: ignore[operator]
        return {f"{name}/{layer}": self.weight * value for layer, value in terms.items()}


class ReconstructionTerm(Term):
    """The decoder's output against the head's output that the encoder was given.

    Args:
        objective: As of :class:`Term`.
        at: Name of the split.
        weight: As of :class:`Term`.
    """

    def __init__(self, objective: nn.Module, at: str, weight: float = 1.0) -> None:
        super().__init__(objective, weight)
        self.at = at
        self.student = (HEAD, at)

    def forward(self, seen: Seen) -> Tensor:
        """Return the unweighted loss."""
        return self.objective(seen.student[self.at], seen.student[HEAD])


class RateTerm(Term):
    """The rate of a representation under its learned prior."""

    student = (LIKELIHOODS,)

    def forward(self, seen: Seen) -> Tensor:
        """Return the unweighted loss."""
        return self.objective(seen.student[LIKELIHOODS])


class GaussianTerm(Term):
    """The divergence of a stochastic representation from its prior."""

    student = (MEAN, LOG_VARIANCE)

    def forward(self, seen: Seen) -> Tensor:
        """Return the unweighted loss."""
        return self.objective(seen.student[MEAN], seen.student[LOG_VARIANCE])
