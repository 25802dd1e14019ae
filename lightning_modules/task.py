"""The one task: it trains a network on weighted terms, and measures it by evaluators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cleave.architectures import StagedNetwork
from cleave.architectures.inserts.switchable import draw_width
from cleave.architectures.modes import evaluating
from cleave.architectures.naming import did_you_mean
from cleave.lightning_modules import caching, privates
from cleave.lightning_modules.evaluators import Evaluator, default_evaluators
from cleave.lightning_modules.frozen import Frozen, asked_for, outputs_layers
from cleave.lightning_modules.learning import (
    check_codes,
    check_network,
    check_run,
    child_name,
    default_parts,
    freeze,
    frozen_modules,
    what_learns,
)
from cleave.lightning_modules.measuring import Batch, MeasuredModule
from cleave.lightning_modules.optimization.optimizers import check_rates, clip_apart, optimizers_of, parameter_groups
from cleave.lightning_modules.optimization.training import DEFAULT, Training, prepare
from cleave.lightning_modules.private_training.checks import check_parts, count_of
from cleave.lightning_modules.private_training.training import PrivateTraining
from cleave.lightning_modules.term import PIXELS, PROGRESS, STUDENT, TEACHER, Term, asked_outputs, take_over, together


class Task(MeasuredModule):
    """Trains a :class:`~cleave.architectures.StagedNetwork` on a sum of weighted terms.

    Student and frozen networks run once a step, no further than the terms ask. A term is logged as ``train/TERM``, one
    of several values as ``train/TERM/NAME``. In validation and testing the network runs once for all evaluators; in
    testing whatever passes a bottleneck goes through its real bytes.

    Args:
        network: The network, trained in place.
        terms: The terms of the objective by name.
        training: Optimizer, schedule, seed and the like.
        evaluators: What measures the network; ``None`` takes those of what it has.
        others: Frozen networks on the same inputs by the name that terms call them, such as ``teacher``. Those that no
            term asks for are left aside; without one that a term asks for the task evaluates only.
        train: Parts that learn, such as ``backbone``, ``bottleneck``, ``exits/layer1``, and ``terms/NAME`` for the
            parameters of single terms; ``None`` takes all that the terms read. The others are frozen, running
            statistics included.
        feature_cache: ``use``: whether to compute once what frozen parts make of the training images; and
            ``directory``, ``dtype`` and ``views`` of :meth:`~cleave.datamodules.ImageDataModule.cache_features`.
        extra_terms: More terms by name, such as a reconstruction beside distillation.
        reads: The part of a batch that the networks run on.

    Attributes:
        losses: The weighted values of the terms in the last training step.
        own_terms: Names of the terms that are the method's own, without ``extra_terms``.
        private: What makes the training differentially private, ``None`` where nothing does.

    Raises:
        CutError: A term reads an output that its network lacks.
        TypeError: ``network`` is not made of stages.
        ValueError: A term stands there twice, or reads nothing that learns; ``train`` names what is not there or learns
            nothing; outputs that a term compares differ in shape; ``lr_scales`` names what the network lacks.
    """

    trains: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that a method trains by default."""

    def __init__(
        self,
        network: StagedNetwork,
        terms: Mapping[str, Term],
        *,
        training: Training = DEFAULT,
        evaluators: Sequence[Evaluator] | None = None,
        others: Mapping[str, Frozen] | None = None,
        train: Sequence[str] | None = None,
        feature_cache: Mapping[str, Any] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        reads: str = "images",
    ) -> None:
        check_network(network, type(self).__name__)
        named = together(terms, extra_terms or {})
        for term in named.values():
            term.bind(network)
            network.check_names(term.asks(STUDENT))
        if train is None and self.trains:
            train = default_parts(network, self.trains, list((extra_terms or {}).values()))
        learning = what_learns(network, named, train, type(self).__name__)
        check_rates(network, training)
        measured_by = default_evaluators(network) if evaluators is None else evaluators
        super().__init__(network, measured_by, learning.parts, reads, training.seed)
        self.settings = training
        self.losses: dict[str, Tensor] = {}
        self.feature_cache = dict(feature_cache or {})
        self.trained_terms = learning.terms
        self.term_names = tuple(named)
        self.own_terms = tuple(terms)
        self.terms = nn.ModuleDict({child_name(name): term for name, term in named.items()})
        self.others = asked_for(others or {}, list(named.values()), network)
        self.asked = asked_outputs(named.values())
        self.save_hyperparameters(training.recorded, logger=False)
        freeze(network, frozen_modules(network, learning.parts), self.terms, learning.terms)
        self.private = None if training.dp is None else PrivateTraining(training.dp)
        if self.private is not None:
            check_parts(network, learning.parts, {name: named[name] for name in learning.terms}, training.compile)
        prepare([network, *(cast(StagedNetwork, frozen.network) for frozen in self.others.values())], training)

    @classmethod
    def layers(cls, split: Sequence[str], settings: Mapping[str, Any], owner: str = STUDENT) -> list[str]:
        """Return the layers whose features the terms of a config read, before a network exists that is cut there.

        Args:
            split: The layers with a bottleneck.
            settings: The config of the task as plain containers: ``terms``, ``extra_terms``, and a method's own.
            owner: Whose layers: ``student``, or another network of the terms.
        """
        terms = [*(settings.get("terms") or {}).values(), *(settings.get("extra_terms") or {}).values()]
        groups = (name for term in terms for name in term.get("of", ()))
        names = (name for group in groups for name in ([group] if isinstance(group, str) else group))
        return outputs_layers(names, owner)

    @property
    def monitor(self) -> str:
        """The logged value by which the best weights are chosen."""
        if self.settings.monitor is not None:
            return self.settings.monitor
        found = [cast(Evaluator, each).monitor(self.trained_parts) for each in self.evaluators]
        return next((name for name in reversed(found) if name is not None), "train/loss")

    # --- objective --------------------------------------------------------------------------------------------------

    def named_terms(self) -> Iterator[tuple[str, Term]]:
        """Yield the terms by name."""
        for name in self.term_names:
            yield name, cast(Term, self.terms[child_name(name)])

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted values of all terms by name; those that nothing trained reaches are left out."""
        values = self.values(batch)
        losses: dict[str, Tensor] = {}
        for name, term in self.named_terms():
            losses |= term.losses(name, values)
        return {name: value for name, value in losses.items() if value.requires_grad}

    def values(self, batch: Batch) -> dict[str, Any]:
        """Return all that the terms may read of a batch: its parts, and what each network makes of it, run once."""
        inputs = batch.get(self.reads)
        values: dict[str, Any] = {name: part for name, part in batch.items() if name != "given"}
        if self._reads(PROGRESS):
            values[PROGRESS] = self.progress()
        for owner, names in self.asked.items():
            with torch.set_grad_enabled(owner == STUDENT and torch.is_grad_enabled()):
                given = caching.given_of(batch, owner)
                found = self.network_of(owner).outputs(inputs, names, given=given)
            values |= {f"{owner}/{name}": value for name, value in found.items()}
        return values

    def network_of(self, owner: str) -> StagedNetwork:
        """Return the network that terms call by a name.

        Raises:
            ValueError: There is no such network.
        """
        if owner == STUDENT:
            return self.network
        if owner not in self.others:
            close = did_you_mean(owner, [STUDENT, TEACHER, *self.others])
            raise ValueError(f"{type(self).__name__} needs a {owner}; give {owner}.ckpt_path.{close}")
        return cast(StagedNetwork, self.others[owner].network)

    def progress(self) -> float:
        """How much of the training has passed, 0 to 1."""
        if self._trainer is None:
            return 1.0
        total = float(self.trainer.estimated_stepping_batches)
        return min(1.0, self.trainer.global_step / max(1.0, total - 1))

    # --- training ---------------------------------------------------------------------------------------------------

    def freeze_parts(self) -> None:
        """Leave gradients to what learns.

        Another step of the run may have frozen other parts; what the network itself keeps fixed stays so.
        """
        freeze(self.network, frozen_modules(self.network, self.trained_parts), self.terms, self.trained_terms)

    def frozen_modules(self) -> list[nn.Module]:
        """Return the parts of the network, and the terms, that neither learn nor move their running statistics."""
        terms: list[nn.Module] = [term for name, term in self.named_terms() if name not in self.trained_terms]
        return [*frozen_modules(self.network, self.trained_parts), *terms]

    def set_modes(self) -> None:
        """Put what learns into train mode and what is frozen into eval mode, running statistics included."""
        self.network.train()
        self.terms.train()
        for module in self.frozen_modules():
            module.eval()

    def setup(self, stage: str) -> None:
        """Freeze before the optimizer is built."""
        if stage == "fit":
            self.freeze_parts()
            self.network.train()  # what a step before left in eval mode would alarm Lightning

    def on_fit_start(self) -> None:
        """Refuse what would train for nothing; bring frozen networks to the device and precision; fill the cache.

        Raises:
            ValueError: A network that a term asks for is missing, the range of frozen codes was never measured, a loss
                follows a run without an end, or several processes would wait for gradients that a step does not give.
        """
        for owner in self.asked:
            self.network_of(owner)
        check_codes(self.network, self.asked[STUDENT], self.trained_parts)
        check_run(self.trainer, self.network, dict(self.named_terms()))
        for frozen in self.others.values():
            frozen.to(self.device)
            self.trainer.precision_plugin.convert_module(frozen.network)
        if self.feature_cache.get("use"):
            self._cache_frozen()

    def on_train_start(self) -> None:
        """Set every part's mode and the loader's place: a run resumed inside an epoch gets no epoch start."""
        self.set_modes()
        privates.restore_loaders(self.trainer)
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """Set every part's mode; Lightning leaves each as it finds it."""
        self.set_modes()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reseed from (seed, epoch, batch, rank), so that a resumed step draws what an uninterrupted one drew.

        Of a network of several widths, draw that of the step.
        """
        self.reseed(self.current_epoch, batch_idx)
        for number, (cut, widths) in enumerate(self.network.widths.items()):
            place = (self.settings.seed, self.current_epoch, batch_idx, *((cut,) if number else ()))
            self.network.set_bits(draw_width(widths, *place), cut)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the terms and log each of them."""
        if not count_of(batch):  # as Poisson sampling may draw it: a step without a loss
            return torch.stack([0.0 * weight.sum() for weight in self.parameters() if weight.requires_grad]).sum()
        losses = self.training_loss(batch)
        self.losses = {name: value.detach() for name, value in losses.items()}
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True)
        if len(losses) > 1:
            self.log_dict({f"train/{name}": value for name, value in self.losses.items()})
        return total

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group trainable parameters by their rate and by whether they decay."""
        return parameter_groups(self.network, self.terms, self.settings)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Bring along what makes the training private, if it is."""
        return [] if self.private is None else [self.private]

    def configure_optimizers(self) -> Any:
        """Build the optimizer over what is trainable, and its scheduler."""
        return optimizers_of(self.settings, self.parameter_groups(), self.trainer, self.monitor)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of network and terms apart: a term changes no step of the network by its own gradients."""
        if gradient_clip_val and any(weight.grad is not None for weight in self.terms.parameters()):
            clip_apart(optimizer, self.terms, gradient_clip_val, gradient_clip_algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which frozen networks the student learns from."""
        super().on_save_checkpoint(checkpoint)
        if self.others:
            checkpoint["others"] = {name: frozen.record() for name, frozen in self.others.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other frozen networks."""
        super().on_load_checkpoint(checkpoint)
        for name, recorded in checkpoint.get("others", {}).items():
            if name in self.others:
                self.others[name].check(name, recorded)

    def take_over_terms(self, state: Mapping[str, Tensor]) -> list[str]:
        """Load the weights of terms that another task's state dict holds under the same names and in the same shapes.

        Returns:
            Their names.
        """
        return take_over(self.terms, state)

    # --- before the first step --------------------------------------------------------------------------------------

    def _reads(self, part: str) -> bool:
        return any(part in term.names for _, term in self.named_terms())

    def stored(self) -> caching.Stored:
        """Return which outputs of frozen networks and parts the feature cache stores.

        Raises:
            ValueError: Nothing frozen stands before what is trained.
        """
        inputs = self._reads(self.reads) or self._reads(PIXELS)
        stored = caching.what_is_stored(self.network, self.trained_parts, self.asked, inputs)
        if not stored.outputs:
            method = f"{type(self).__name__} with train={list(self.trained_parts)}"
            fix = "freeze what comes first, or leave the cache out"
            raise ValueError(f"feature_cache.use=true: {method} has no frozen part before what it trains; {fix}")
        return self.worth_storing(stored)

    def worth_storing(self, stored: caching.Stored) -> caching.Stored:
        """Return what pays to be stored of what can be; here all of it."""
        return stored

    def frozen_digest(self) -> str:
        """Return the digest of all that stored outputs depend on."""
        return caching.digest_of(self.stored(), self._networks(), self.trained_parts)

    def _networks(self) -> dict[str, StagedNetwork]:
        return {owner: self.network_of(owner) for owner in self.asked}

    def _cache_frozen(self) -> None:
        stored, networks = self.stored(), self._networks()
        if not stored.outputs:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "cache_features"):
            raise ValueError("feature_cache.use=true needs a data module of Cleave's, whose images it can go through")
        with evaluating(self.network):  # for now alone: Lightning has yet to look at the modes
            data.cache_features(
                lambda batch: stored.compute(networks, batch[self.reads]),
                self.frozen_digest(),
                images=stored.inputs,
                device=self.device,
                **{key: value for key, value in self.feature_cache.items() if key != "use"},
            )
