"""The ensembling step of Zero Time Waste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.learning import check_network
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import Term
from cleave.lightning_modules.training import DEFAULT, Training


class ZeroTimeWaste(Task):
    """Cross entropy of the geometric ensembles of all exits so far (Wołczyk et al. 2021, "Zero Time Waste").

    The last of the method's steps: backbone and exits are frozen, the ensembles' weights learn. The steps before it
    train the backbone, then the exits of a cascade.

    Args:
        network: The network to train, with exits and their ensemble.
        loss: Compares the ensembles' answers with the labels.
        train: Parts that learn; ``None``: the ensemble.
        extra_terms: More terms by name.
        others: Frozen networks by name.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.

    Raises:
        ValueError: The network has no ensemble.
    """

    trains = ("ensemble",)

    def __init__(
        self,
        network: StagedNetwork,
        *,
        loss: nn.Module,
        train: Sequence[str] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        others: Mapping[str, Frozen] | None = None,
        evaluators: Sequence[Evaluator] | None = None,
        training: Training = DEFAULT,
        feature_cache: Mapping[str, Any] | None = None,
    ) -> None:
        check_network(network, "ZeroTimeWaste")
        if network.ensemble is None:
            raise ValueError("ZeroTimeWaste trains an ensemble, which this network lacks; set exits.ensemble=true")
        terms = {"exit": Term(loss, of=["student/answers", "labels"])}
        super().__init__(
            network,
            terms,
            training=training,
            evaluators=evaluators,
            others=others,
            train=train,
            feature_cache=feature_cache,
            extra_terms=extra_terms,
        )
