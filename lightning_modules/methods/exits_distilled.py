"""Exits that learn from a better informed output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cleave.architectures.modes import evaluating
from cleave.architectures.multi_exit import MultiExitNetwork
from cleave.lightning_modules.exits import ExitTask, SeenExits
from cleave.lightning_modules.teacher import Teacher
from cleave.losses import ExitDistillationLoss


class ExitsDistilled(ExitTask):
    """Labels and the softened outputs of the final exit, of the next one, or of a teacher, for every exit.

    From the final exit: Phuong and Lampert 2019, "Distillation-Based Training for Multi-Exit Architectures", and
    Li et al. 2019. End to end, or with ``train=[heads]`` on a frozen backbone.

    Args:
        network: The multi-exit network to train.
        *args: As of :class:`~cleave.lightning_modules.exits.ExitTask`.
        objective: Says whom the exits learn from, and how much.
        teacher: The frozen teacher, where ``objective.source`` is ``teacher``; left aside otherwise.
        **kwargs: As of :class:`~cleave.lightning_modules.exits.ExitTask`.

    Raises:
        ValueError: The teacher's logits are of other classes, or the weights do not fit the exits or leave nothing of
            ``train`` to learn.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        *args: Any,
        objective: ExitDistillationLoss,
        teacher: Teacher | None = None,
        **kwargs: Any,
    ) -> None:
        self.__dict__["needs_teacher"] = objective.needs_teacher
        super().__init__(network, *args, teacher=teacher, **kwargs)
        objective.bind(len(network.exit_names), network.cost_shares())
        self.objective = objective
        self.leave_out_weightless(objective)
        if self._teacher is not None:
            _check_classes(self._teacher, network)

    def exit_terms(self, seen: SeenExits) -> list[Tensor]:
        """Return the weighted loss of each exit."""
        if self.needs_teacher and seen.teacher is None:
            raise ValueError("method.objective.source=teacher needs a teacher; give teacher.ckpt_path")
        return self.objective.terms(seen.own, seen.labels, seen.teacher, self.progress())


def _check_classes(teacher: Teacher, network: MultiExitNetwork) -> None:
    sample = torch.zeros(1, *network.image_shape)
    with torch.no_grad(), evaluating(teacher.network):
        classes = teacher.network(sample).shape[-1]
    if classes != network.classes:
        raise ValueError(
            f"the teacher knows {classes} classes, the exits {network.classes}: they cannot be compared; take a "
            "teacher that was trained on the same classes"
        )
