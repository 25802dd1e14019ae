"""The callback that makes a task's training differentially private."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.optim import Optimizer

from cleave.architectures import Bottleneck, UniformQuantizer
from cleave.architectures.modes import evaluating
from cleave.datamodules.drawing import stream_seed
from cleave.datamodules.sampling import PoissonSampler
from cleave.lightning_modules.private_training.checks import check_batch, check_sums, check_trainer, count_of
from cleave.lightning_modules.private_training.sample_gradients import SampleGradients, clipped_sum
from cleave.lightning_modules.private_training.settings import DPSGD

if TYPE_CHECKING:
    from cleave.lightning_modules.task import Task

KEY = "dp"
_MEASURED = 256


class PrivateTraining(Callback):
    """Gives the optimizer of a task clipped gradients with noise, and keeps account of what that spends.

    The network, its optimizer and its checkpoints stay as they are without it. The range of codes follows no training
    images: it is measured on validation images at the start of each epoch.

    Args:
        settings: How much noise.

    Attributes:
        history: Steps taken: (σ, q, number of steps) each; those of a resumed run before included.
        noise: σ of the training.
    """

    def __init__(self, settings: DPSGD) -> None:
        self.settings = settings
        self.history: list[tuple[float, float, int]] = []
        self.noise = 0.0
        self._rate, self._batch_size = 0.0, 1.0
        self._gradients: SampleGradients | None = None
        self._private: list[nn.Parameter] = []
        self._tried = False
        self._secret = torch.Generator()

    @property
    def epsilon(self) -> float:
        """ε that was spent so far."""
        return self.settings.spent(self.history)

    @property
    def verdict(self) -> str:
        """What the training spent, as a sentence."""
        steps = sum(count for _, _, count in self.history)
        known = " against whoever does not know the seed" if self.settings.seeded else ""
        return (
            f"ε = {self.epsilon:.4g} at δ = {self.settings.delta:g} for the training images{known}, by {steps:,} steps "
            f"with noise {self.noise:.4g} and norms up to {self.settings.max_grad_norm:g} ({self.settings.accountant})"
        )

    # --- begin and end ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a trainer that would not keep the promise."""
        check_trainer(trainer)
        data = getattr(trainer, "datamodule", None)
        if getattr(data, "mixup", 0) or getattr(data, "cutmix", 0):
            raise ValueError("DP-SGD clips what single images add, but mixup or cutmix mixes them; set both to 0")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the noise, and watch the layers."""
        task = cast("Task", pl_module)
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if not isinstance(sampler, PoissonSampler):
            raise ValueError(
                "DP-SGD counts on batches in which each image is with the same probability, and this run's are not "
                "drawn so; set data.sampling=poisson"
            )
        self._rate = sampler.rate
        self._batch_size = sampler.rate * len(sampler.dataset)  # type: ignore[arg-type]
        self.noise = self.settings.noise(sampler.rate, trainer.estimated_stepping_batches)
        self._check_resumed()
        self._secret = torch.Generator(task.device)
        if not self.settings.seeded:
            sampler.salt = secrets.token_hex(16)
            self._secret.manual_seed(secrets.randbits(63))
        ranges = {weight for each in _quantizers(task) for weight in each.parameters()}
        self._private = [each for each in task.network.parameters() if each.requires_grad and each not in ranges]
        self._tried = False
        self._gradients = SampleGradients(task.network, self._private)

    def _check_resumed(self) -> None:
        if self.history and self.history[-1][:2] != (self.noise, self._rate):
            noise, rate, _ = self.history[-1]
            raise ValueError(
                f"the training so far had noise {noise:.4g} and drew each image with probability {rate:.4g}, now it "
                f"would be {self.noise:.4g} and {self._rate:.4g}, which follow from training.dp, the number of epochs, "
                "data.batch_size and the images; resume with those of before"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the layers alone again."""
        if self._gradients is not None:
            self._gradients.remove()
            self._gradients = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the layers alone where training breaks off."""
        self.on_train_end(trainer, pl_module)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _measure_ranges(self, trainer: pl.Trainer, task: Task) -> None:
        """Measure the range of codes on validation images, which DP-SGD need not cover.

        Raises:
            ValueError: There are none.
        """
        if not (measured := _measured(task)):
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "sample_batch"):
            raise ValueError(
                "under DP-SGD the range of codes is measured on validation images, and there is no data module of "
                "Cleave's to give some; set codec.range=sample"
            )
        batch = {name: _on(value, task.device) for name, value in data.sample_batch("val", _MEASURED).items()}
        inputs = data.on_after_batch_transfer(batch, 0)[task.reads]
        task.reseed(trainer.current_epoch, "ranges")
        with evaluating(task.network), torch.no_grad():
            for cut, bottleneck in measured.items():
                name = f"{cut}/{bottleneck.quantised}"
                z = task.network.outputs(inputs, [name])[name]
                cast(UniformQuantizer, bottleneck.quantizer).set_range(z.min().item(), z.max().item())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Expect the gradients of a batch's samples; try on the first batch of several whether samples stand alone."""
        task = cast("Task", pl_module)
        assert self._gradients is not None
        if batch_idx == 0:  # a run resumed at an epoch's end gets no epoch start
            self._measure_ranges(trainer, task)
        for quantizer in _quantizers(task):
            quantizer.eval()  # else it would follow what it sees
        count = count_of(batch)
        if not self._tried and count > 1:
            self._gradients.clear()
            check_batch(task, batch)
        self._gradients.clear(count)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Put clipped sums with noise in the place of the gradients."""
        task, gradients = cast("Task", pl_module), self._gradients
        assert gradients is not None
        if not self._tried and gradients.count > 1:
            check_sums(task.network, gradients.found, self._private)
            self._tried = True
        most = self.settings.max_grad_norm
        own = {weight: gradients.found[weight] for weight in self._private if weight in gradients.found}
        sums = clipped_sum(own, most)
        generator = self._generator(task, trainer.global_step)
        for weight in task.network.parameters():
            weight.grad = None
        for weight in self._private:
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
            total = noise * (self.noise * most)
            weight.grad = (total + sums[weight] if weight in sums else total) / self._batch_size
        gradients.clear()
        self._count()

    def _generator(self, task: Task, step: int) -> torch.Generator:
        if self.settings.seeded:
            self._secret.manual_seed(stream_seed(task.seed, "dp", step))
        return self._secret

    def _count(self) -> None:
        taken = self.history.pop()[2] if self.history else 0
        self.history.append((self.noise, self._rate, taken + 1))

    # --- reports ----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was spent so far."""
        pl_module.log("train/epsilon", self.epsilon)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record what was spent on the weights that are saved."""
        checkpoint[KEY] = {
            "epsilon": self.epsilon,
            "delta": self.settings.delta,
            "noise_multiplier": self.noise,
            "max_grad_norm": self.settings.max_grad_norm,
            "accountant": self.settings.accountant,
            "steps": sum(count for _, _, count in self.history),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the steps taken, from which the account goes on."""
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the account of a checkpoint."""
        self.history = [tuple(each) for each in state_dict["history"]]


def _measured(task: Task) -> dict[str, Bottleneck]:
    """Return the bottlenecks that train and whose codes have a range that all samples share."""
    found = task.network.bottlenecks.items()
    return {
        cut: each
        for cut, each in found
        if isinstance(each.quantizer, UniformQuantizer)
        and each.quantizer.range != "sample"
        and f"quantizer/{cut}" in task.trained_parts
    }


def _quantizers(task: Task) -> list[UniformQuantizer]:
    return [cast(UniformQuantizer, each.quantizer) for each in _measured(task).values()]


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
