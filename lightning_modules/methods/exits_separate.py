"""Training exits on a backbone that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.methods.exits_joint import ExitsJoint
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.term import Term


class ExitsSeparate(ExitsJoint):
    """Cross entropy of the exits alone; the backbone is frozen for good, its running statistics included.

    All exits learn at once, or with ``train=[exits/layer2]`` one at a time, as steps of a recipe. With
    ``feature_cache.use`` the backbone runs once for the whole training.

    Args:
        network: The network to train, with exits.
        loss: Weighs the exits; it may follow the progress of the training.
        train: The exits that learn; ``None``: all.
        extra_terms: More terms by name.
        others: Frozen networks by name.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.

    Raises:
        ValueError: ``train`` names anything else than exits.
    """

    trains = ("exits",)

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
        super().__init__(
            network,
            loss=loss,
            train=train,
            extra_terms=extra_terms,
            others=others,
            evaluators=evaluators,
            training=training,
            feature_cache=feature_cache,
        )
        if learning := [part for part in self.trained_parts if part.partition("/")[0] != "exits"]:
            raise ValueError(
                f"train names {learning[0]!r}, which separate training keeps frozen; use method=exits_joint, or leave "
                "it out"
            )
