"""Reconstruction of the features at the split."""

from __future__ import annotations

from typing import Any

from torch import nn

from cleave.architectures.split import SplitNetwork
from cleave.lightning_modules.split import SplitTask
from cleave.lightning_modules.terms import ReconstructionTerm


class Reconstruction(SplitTask):
    """An autoencoder inserted at the split learns to reproduce the feature there (Matsubara et al. 2022, eq. 5).

    Encoder, quantiser and decoder alone are trained; the backbone around them is frozen, its tail does not run in
    training, and no teacher is needed: the frozen head gives both input and target.

    Args:
        network: The split network to train, of the form ``insert``.
        *args: As of :class:`~cleave.lightning_modules.split.SplitTask`.
        objective: Compares the decoder's output (B, ...) with the feature at the split.
        **kwargs: As of :class:`~cleave.lightning_modules.split.SplitTask`.

    Raises:
        ValueError: The network's bottleneck replaces the head, so that there is nothing to reconstruct.
    """

    def __init__(self, network: SplitNetwork, *args: Any, objective: nn.Module, **kwargs: Any) -> None:
        if getattr(network, "head", None) is None:
            raise ValueError(
                "reconstruction needs the head before the bottleneck: use split.form=insert, or "
                "method=head_distillation where the bottleneck replaces the head"
            )
        terms = {"reconstruction": ReconstructionTerm(objective, at=network.split)}
        super().__init__(network, *args, terms=terms, **kwargs)
