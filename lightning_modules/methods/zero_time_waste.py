"""The ensembling step of Zero Time Waste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from cleave.architectures import GeometricEnsemble, StagedNetwork
from cleave.architectures.naming import did_you_mean
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.learning import check_network
from cleave.lightning_modules.measuring import Batch
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import STUDENT, Term
from cleave.losses import fit_geometric_ensemble

GRADIENTS, LBFGS = FITS = ("gradients", "lbfgs")


class ZeroTimeWaste(Task):
    """Cross entropy of the geometric ensembles of all exits so far (Wołczyk et al. 2021, "Zero Time Waste").

    The last of the method's steps: backbone and exits are frozen, the ensembles' weights learn. The steps before it
    train the backbone, then the exits of a cascade.

    Trained by gradients for a few epochs, the ensembles may answer worse than the exits that they are made of; fitted
    they are at the optimum after one epoch, in which the exits' logits are gathered.

    Args:
        network: The network to train, with exits and their ensemble.
        loss: Compares the ensembles' answers with the labels.
        fit: ``gradients``: by the optimizer, step by step, as published; ``lbfgs``: by
            :func:`~cleave.losses.fit_geometric_ensemble` at the end of each epoch, on the logits of its images.
        train: Parts that learn; ``None``: the ensemble.
        extra_terms: More terms by name.
        others: Frozen networks by name.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`.

    Raises:
        ValueError: The network has no ensemble, ``fit`` is unknown, or something else would have to be trained in a fit
            by ``lbfgs``.
    """

    trains = ("ensemble",)

    def __init__(
        self,
        network: StagedNetwork,
        *,
        loss: nn.Module,
        fit: str = "gradients",
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
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}.{did_you_mean(str(fit), FITS)}")
        if fit == LBFGS and (extra_terms or tuple(train or self.trains) != self.trains):
            given = f"train={list(train or self.trains)} and extra_terms={list(extra_terms or {})}"
            raise ValueError(
                f"fit=lbfgs finds the ensemble's weights and trains nothing else, got {given}; leave them out, or use "
                "fit=gradients"
            )
        self.fit = fit
        self._gathered: list[tuple[Tensor, Tensor]] = []
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
        if fit == LBFGS:
            asked = dict.fromkeys([*self.asked[STUDENT], *network.group("exits")])
            self.asked = {**self.asked, STUDENT: tuple(asked)}

    def values(self, batch: Batch) -> dict[str, Any]:
        """Return what the terms read; where weights are fitted, keep the exits' logits and the labels."""
        found = super().values(batch)
        if self.fit == LBFGS:
            logits = [found[f"{STUDENT}/{name}"].detach().float() for name in self.network.group("exits")]
            labels = batch["labels"]  # of mixed images, the class with the greatest share
            self._gathered.append((torch.stack(logits), labels if labels.ndim == 1 else labels.argmax(1)))
        return found

    def on_train_epoch_start(self) -> None:
        """Begin to gather."""
        super().on_train_epoch_start()
        self._gathered = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the terms, by which no weight moves where weights are fitted."""
        total = super().training_step(batch, batch_idx)
        return total if self.fit == GRADIENTS else 0 * total

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Fit the ensembles behind an epoch's last batch, before they are validated."""
        if self.fit == LBFGS and batch_idx + 1 >= self.trainer.num_training_batches:
            logits, labels = (torch.cat(parts, -2 + number) for number, parts in enumerate(self._over_ranks()))
            fitted = fit_geometric_ensemble(list(logits), labels.flatten())
            cast(GeometricEnsemble, self.network.ensemble).set(*fitted)
            self._gathered = []

    def _over_ranks(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (E, B, C) and labels (1, B) of all batches of all ranks, in the same order everywhere."""
        logits = torch.cat([own for own, _ in self._gathered], 1)
        labels = torch.cat([own for _, own in self._gathered])
        if self.trainer.world_size == 1:
            return [logits], [labels.unsqueeze(0)]
        every, known = self.all_gather(logits), self.all_gather(labels)
        return list(every), [own.unsqueeze(0) for own in known]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what was gathered of an epoch, so that a run resumed inside it fits to all of it."""
        super().on_save_checkpoint(checkpoint)
        if self._gathered:
            checkpoint["gathered"] = [list(pair) for pair in self._gathered]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on gathering."""
        super().on_load_checkpoint(checkpoint)
        self._gathered = [(logits, labels) for logits, labels in checkpoint.get("gathered", [])]

    def on_train_end(self) -> None:
        """Warn where an ensemble is worse than the exit that it stands for."""
        logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        for name in self.network.exits:
            both, own = logged.get(f"val/acc_exit/{name}"), logged.get(f"val/acc_own/{name}")
            if both is not None and own is not None and both < own:
                cure = "" if self.fit == LBFGS else "; train it longer, or fit it by method.fit=lbfgs"
                rank_zero_warn(
                    f"the ensemble at {name} is worse than its exit in validation: {both:.4f} against {own:.4f}{cure}"
                )
