"""Joint training of a backbone and its exits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cleave.architectures.multi_exit import MultiExitNetwork
from cleave.lightning_modules.exits import ExitTask, SeenExits
from cleave.losses import JointExitLoss


class ExitsJoint(ExitTask):
    """The weighted sum of every exit's cross entropy, end to end (eq. 8 of Matsubara et al. 2022).

    Args:
        network: The multi-exit network to train.
        *args: As of :class:`~cleave.lightning_modules.exits.ExitTask`.
        objective: Weighs the exits; it may follow the progress of the training.
        gradient_equilibrium: Scale gradients where exits branch off (Li et al. 2019), so that those of many exits do
            not add up in early layers.
        **kwargs: As of :class:`~cleave.lightning_modules.exits.ExitTask`.

    Raises:
        ValueError: The weights do not fit the exits, or leave nothing of ``train`` to learn.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        *args: Any,
        objective: JointExitLoss,
        gradient_equilibrium: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, *args, **kwargs)
        objective.bind(len(network.exit_names), network.cost_shares())
        self.objective = objective
        self.leave_out_weightless(objective)
        self.gradient_equilibrium = gradient_equilibrium

    def exit_terms(self, seen: SeenExits) -> list[Tensor]:
        """Return the weighted cross entropy of each exit."""
        return self.objective.terms(seen.own, seen.labels, self.progress())

    def reducing(self) -> dict[str, Any]:
        """Further arguments of the backbone's run."""
        return {"equilibrium": self.gradient_equilibrium}
