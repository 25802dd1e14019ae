"""The base task: optimizer, schedule, metrics, evaluation and modes that every method shares."""

from __future__ import annotations

import abc
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from cleave.architectures.inserts.entropy_bottleneck import EntropyBottleneck
from cleave.architectures.multi_exit import GeometricEnsemble
from cleave.architectures.naming import did_you_mean

UNDECAYED = (EntropyBottleneck, GeometricEnsemble)  # neither has weights that should be small
Batch = tuple[Tensor, Tensor]
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Task(pl.LightningModule, abc.ABC):
    """Trains a classification network; a subclass states only its objective, :meth:`training_loss`.

    Args:
        network: Maps normalised images (B, C, H, W) to logits (B, classes). It is trained in place.
        class_names: Names of the classes in the order of the logits.
        optimizer: Called with parameter groups, returns the optimizer: a ``functools.partial`` of any torch optimizer.
        scheduler: Called with the optimizer, returns a learning-rate scheduler; ``None`` keeps the rate constant. In a
            ``functools.partial`` the value ``"total_steps"`` stands for the optimizer steps of the whole run.
        scheduler_interval: ``epoch`` or ``step``: how often the scheduler is stepped.
        monitor: Metric that a plateau scheduler watches.
        lr_scales: Layer-wise rates: a factor on the learning rate by prefix of the parameters' names inside
            ``network``; the longest prefix wins. A factor of 0 is refused: freeze such a part instead.
        decay_norms_and_biases: Whether weight decay also applies to parameters of one dimension or none, and to those
            of a learned prior or an ensemble of exits.
        compile: Compile the network's parts in place with ``torch.compile``.
        channels_last: Keep the weights of convolutions, and with them all maps, channels last in memory, which CPUs and
            tensor cores in half precision run faster.
        seed: Seed of the randomness inside a training step (dropout, drop-path, noise), which depends on
            (seed, epoch, batch, rank) alone, so that a resumed run repeats it.

    Raises:
        ValueError: Fewer than two classes, an unknown ``lr_scales`` prefix or ``scheduler_interval``.
    """

    def __init__(
        self,
        network: nn.Module,
        class_names: Sequence[str],
        optimizer: Callable[[Parameters], Optimizer],
        scheduler: Callable[[Optimizer], Any] | None = None,
        *,
        scheduler_interval: str = "epoch",
        monitor: str = "val/acc",
        lr_scales: Mapping[str, float] | None = None,
        decay_norms_and_biases: bool = False,
        compile: bool = False,  # noqa: A002
        channels_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError(f"a classifier needs at least two classes, got {list(class_names)}")
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval must be 'epoch' or 'step', got {scheduler_interval!r}")
        self.network = network
        self.class_names = list(class_names)
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.scheduler_interval = scheduler_interval
        self.monitor = monitor
        self.lr_scales = dict(lr_scales or {})
        self.decay_norms_and_biases = decay_norms_and_biases
        self.seed = seed
        self.save_hyperparameters(
            {"seed": seed, "lr_scales": self.lr_scales, "decay_norms_and_biases": decay_norms_and_biases}, logger=False
        )
        self._check_lr_scales()
        self.freeze_parts()
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        network.to(memory_format=self.memory_format)
        if compile:
            modules = self.compiled_modules()
            # Parts of one class share the code of their forward, of which torch keeps that many versions.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 4 * len(modules))
            for module in modules:
                module.compile()
        self.val_metrics = self.configure_metrics("val/")
        self.test_metrics = self.configure_metrics("test/")
        self.test_per_class = MulticlassAccuracy(len(self.class_names), average=None)

    # --- what a method may say -------------------------------------------------------------------------------------

    @abc.abstractmethod
    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the named terms of the objective for a batch; their sum is minimised."""

    def frozen_modules(self) -> list[nn.Module]:
        """Parts of the network that neither learn nor move their running statistics."""
        return []

    def compiled_modules(self) -> list[nn.Module]:
        """Parts that ``compile`` compiles in place, one by one where a method runs them one by one."""
        return [self.network]

    def configure_metrics(self, prefix: str) -> MetricCollection:
        """Return the metrics of an evaluation stage: top-1, top-5 beyond five classes, and calibration error."""
        classes = len(self.class_names)
        metrics: dict[str, Any] = {
            "acc": MulticlassAccuracy(classes, average="micro"),
            "ece": CalibrationError(classes, n_bins=15),
            "loss": CrossEntropy(),
        }
        if classes > 5:
            metrics["acc_top5"] = MulticlassAccuracy(classes, average="micro", top_k=5)
        return MetricCollection(metrics, prefix=prefix, compute_groups=False)

    # --- training --------------------------------------------------------------------------------------------------

    def freeze_parts(self) -> None:
        """Leave gradients to what learns.

        Another stage of the run may have frozen other parts; what the network itself keeps fixed stays so.
        """
        if not hasattr(self.network, "learnable"):
            self.network.learnable = frozenset(n for n, p in self.network.named_parameters() if p.requires_grad)  # type: ignore[assignment]
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in self.network.learnable)  # type: ignore[operator]
        for module in self.frozen_modules():
            module.requires_grad_(False)

    def setup(self, stage: str) -> None:
        """Freeze before the optimizer is built."""
        if stage == "fit":
            self.freeze_parts()
            self.network.train()  # what a stage before left in eval mode would alarm Lightning

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, classes)."""
        return self.network(images)

    def set_modes(self) -> None:
        """Put what learns into train mode and what is frozen into eval mode, running statistics included."""
        self.network.train()
        for module in self.frozen_modules():
            module.eval()

    def on_train_start(self) -> None:
        """Set every part's mode and the loader's place: a run resumed inside an epoch gets no epoch start."""
        self.set_modes()
        # Lightning 2.6 restores only loaders that it has yet to make; `estimated_stepping_batches` makes them before.
        self.trainer.fit_loop._load_combined_loader_states()

    def on_train_epoch_start(self) -> None:
        """Set every part's mode; Lightning leaves each as it finds it."""
        self.set_modes()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reseed from (seed, epoch, batch, rank), so that a resumed step draws what an uninterrupted one drew."""
        self.reseed(self.current_epoch, batch_idx)

    def reseed(self, *place: int | str) -> None:
        """Seed torch's generators from the task's seed, a place in the run, and the rank."""
        key = "/".join(map(str, (self.seed, *place, self.global_rank))).encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the objective's terms and log each of them."""
        terms = self.training_loss(batch)
        total = torch.stack(list(terms.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True)
        if len(terms) > 1:
            self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        return total

    def configure_optimizers(self) -> Any:
        """Build the optimizer over what is trainable, and its scheduler."""
        optimizer = self.optimizer_factory(self.parameter_groups())
        if self.scheduler_factory is None:
            return optimizer
        scheduler = {
            "scheduler": self._scheduler(self.scheduler_factory, optimizer),
            "interval": self.scheduler_interval,
            "monitor": self.monitor,
        }
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _scheduler(self, factory: Callable[..., Any], optimizer: Optimizer) -> Any:
        keywords = getattr(factory, "keywords", {})
        if "total_steps" not in keywords.values():
            return factory(optimizer)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("the scheduler needs the number of steps, but the run has no end; set trainer.max_epochs")
        steps = {key: int(total) for key, value in keywords.items() if value == "total_steps"}
        return functools.partial(factory, **steps)(optimizer)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group trainable parameters by their rate and by whether they decay.

        Raises:
            ValueError: Nothing is trainable, or ``lr_scales`` is used with an optimizer that names no rate.
        """
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        scales = {p for m in self.network.modules() if isinstance(m, UNDECAYED) for p in m.parameters()}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                decays = self.decay_norms_and_biases or (parameter.ndim > 1 and parameter not in scales)
                groups.setdefault((self._lr_scale(name), decays), []).append(parameter)
        if not groups:
            raise ValueError(f"{type(self).__name__} has nothing to train: every parameter of the network is frozen")
        base = self._base_lr() if self.lr_scales else 1.0
        settings: list[dict[str, Any]] = []
        for (scale, decays), parameters in groups.items():
            settings.append({"params": parameters})
            if self.lr_scales:
                settings[-1]["lr"] = base * scale
            if not decays:
                settings[-1]["weight_decay"] = 0.0
        return settings

    def _base_lr(self) -> float:
        keywords = getattr(self.optimizer_factory, "keywords", {})
        factory = getattr(self.optimizer_factory, "func", self.optimizer_factory)
        rate = keywords.get("lr", getattr(inspect.signature(factory).parameters.get("lr"), "default", None))
        if not isinstance(rate, int | float):
            raise ValueError("lr_scales needs a learning rate to scale: give the optimizer's lr as a number")
        return float(rate)

    def _lr_scale(self, name: str) -> float:
        prefixes = [p for p in self.lr_scales if name == p or name.startswith(p + ".")]
        return self.lr_scales[max(prefixes, key=len)] if prefixes else 1.0

    def _check_lr_scales(self) -> None:
        known = [name for name, _ in self.network.named_modules() if name]
        known += [name for name, _ in self.network.named_parameters()]
        for prefix, scale in self.lr_scales.items():
            if prefix not in known:
                raise ValueError(f"lr_scales names {prefix!r}, which the network lacks." + did_you_mean(prefix, known))
            if scale <= 0:
                raise ValueError(f"lr_scales[{prefix!r}] must be positive, got {scale}")

    # --- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the network on a validation batch."""
        images, labels = batch
        self.val_metrics.update(self(images).float(), labels)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured; accuracy also shows in the progress bar."""
        values = self.val_metrics.compute()
        self.val_metrics.reset()
        self.log("val/acc", values.pop("val/acc"), prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the network on a test batch."""
        images, labels = batch
        self.measure_test(self(images).float(), labels)

    def measure_test(self, logits: Tensor, labels: Tensor) -> None:
        """Add the logits (B, classes) of a test batch to what is measured."""
        self.test_metrics.update(logits, labels)
        self.test_per_class.update(logits, labels)

    def on_test_epoch_end(self) -> None:
        """Log what was measured, per class too."""
        values = dict(self.test_metrics.compute())
        per_class = self.test_per_class.compute()
        values |= {f"test/acc_class/{name}": value for name, value in zip(self.class_names, per_class, strict=True)}
        # The metrics are the same on every rank by now; Lightning cannot know and would warn.
        self.log_dict(values, sync_dist=True)
        self.test_metrics.reset()
        self.test_per_class.reset()


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits (B, classes); torchmetrics would take small logits for probabilities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits and labels."""
        super().update(preds.softmax(1), target)


class CrossEntropy(MeanMetric):
    """Cross entropy of logits (B, classes) against labels (B,), averaged over all samples seen, in nats."""

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Add a batch."""
        super().update(F.cross_entropy(logits, labels), weight=len(labels))
