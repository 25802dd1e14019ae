"""The ensembling stage of Zero Time Waste."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cleave.architectures.multi_exit import MultiExitNetwork
from cleave.lightning_modules.exits import ExitTask, SeenExits
from cleave.losses import GeometricEnsembleLoss


class ZeroTimeWaste(ExitTask):
    """Cross entropy of the geometric ensembles of all exits so far (Wołczyk et al. 2021, "Zero Time Waste").

    The last of the method's stages: backbone and exits are frozen, the ensembles' weights learn. The stages before it
    train the backbone, then the exits of a cascade, on the network that ``exits.cascade`` and ``exits.ensemble``
    describe; ``method=zero_time_waste`` runs all of them.

    Args:
        network: The multi-exit network to train, with an ensemble.
        *args: As of :class:`~cleave.lightning_modules.exits.ExitTask`.
        objective: Compares the ensembles' answers with the labels.
        **kwargs: As of :class:`~cleave.lightning_modules.exits.ExitTask`.

    Raises:
        ValueError: The network has no ensemble.
    """

    trains = ("ensemble",)

    def __init__(self, network: MultiExitNetwork, *args: Any, objective: GeometricEnsembleLoss, **kwargs: Any) -> None:
        if network.ensemble is None:
            raise ValueError("ZeroTimeWaste trains an ensemble, which this network lacks; set exits.ensemble=true")
        super().__init__(network, *args, **kwargs)
        self.objective = objective

    def exit_terms(self, seen: SeenExits) -> list[Tensor]:
        """Return the cross entropy of each exit's ensemble."""
        assert self.network.ensemble is not None
        return self.objective.terms(self.network.ensemble(seen.own), seen.labels)
