"""Reconstruction of the features at the split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.methods.naming import by_bottleneck
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import Term


class Reconstruction(Task):
    """An autoencoder inserted at the split learns to reproduce the feature there (Matsubara et al. 2022, eq. 5).

    Encoder, quantiser and decoder alone are trained; the backbone around them is frozen, its tail does not run in
    training, and no teacher is needed: the frozen head gives both input and target. Of several bottlenecks each
    reproduces its own feature.

    Args:
        network: The network to train, with bottlenecks of the form ``insert``.
        loss: Compares the decoder's output (B, ...) with the feature at the split.
        train: Parts that learn; ``None``: the bottlenecks.
        extra_terms: More terms by name.
        others: Frozen networks by name.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.

    Raises:
        ValueError: No bottleneck has a feature before it to reconstruct.
    """

    trains = ("bottleneck",)

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
        cuts = by_bottleneck(network, "Reconstruction", "reconstruction")
        kept = {name: cut for name, cut in cuts.items() if f"{cut}/input" in network.emits}
        if not kept:
            raise ValueError(
                "reconstruction needs the head before the bottleneck: use split.form=insert, or "
                "method=head_distillation where the bottleneck replaces the head"
            )
        terms = {name: Term(loss, of=[f"student/{cut}", f"student/{cut}/input"]) for name, cut in kept.items()}
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
