"""Training of an adversary's network, and the choice of its best epoch on images of the adversary's own."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Payloads = Callable[[], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Schooling:
    """How an adversary's network is trained: AdamW with a warm-up and a falling rate.

    Args:
        epochs: Passes over the adversary's images.
        batch_size: Images in a batch.
        lr: Highest learning rate.
        seed: Seed of order and initial weights.

    Raises:
        ValueError: An argument is out of its range.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if isinstance(self.lr, bool) or not isinstance(self.lr, int | float) or not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, such as 2e-3, got {self.lr!r}")


@dataclasses.dataclass(frozen=True)
class Schooled:
    """A trained decoder.

    Attributes:
        decoder: At its best epoch, in eval mode.
        epoch: That epoch; 0: it never beat what it began with, such as the mean image.
        val_mse: Error on the adversary's validation images, the mean squared one unless another loss is trained on.
    """

    decoder: nn.Module
    epoch: int
    val_mse: float


def school(
    decoders: Sequence[nn.Module],
    payloads: Payloads,
    images: Tensor,
    val_payloads: Tensor,
    val_images: Tensor,
    how: Schooling,
    loss: Loss = F.mse_loss,
) -> list[Schooled]:
    """Train decoders and keep each as it was at its best epoch, which the adversary's validation images choose.

    Args:
        decoders: The decoders, on the device where all tensors are.
        payloads: Called once an epoch for what is sent of the training images, (N, ...); noise is drawn anew.
        images: What they are to answer, such as the training images, (N, C, H, W) from 0 to 1.
        val_payloads: What is sent of the validation images.
        val_images: What they are to answer there.
        how: How they are trained.
        loss: The mean over a batch that they learn by and are chosen by.

    Returns:
        Each decoder; untrained where no epoch was better than the mean image.
    """
    steps = how.epochs * math.ceil(len(images) / how.batch_size)
    pupils = [_Pupil(each, steps, how, loss, error_of(each, val_payloads, val_images, loss)) for each in decoders]
    for epoch in range(1, how.epochs + 1):
        sent = payloads()
        for pupil in pupils:
            pupil.learn(sent, images)
            pupil.keep(epoch, error_of(pupil.decoder, val_payloads, val_images, loss))
    return [pupil.best for pupil in pupils]


class _Pupil:
    """A decoder in training."""

    def __init__(self, decoder: nn.Module, steps: int, how: Schooling, loss: Loss, val_mse: float) -> None:
        self.decoder, self.how, self.loss = decoder, how, loss
        self.optimizer = torch.optim.AdamW(decoder.parameters(), lr=how.lr, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate(step, steps))
        self.generator = torch.Generator().manual_seed(how.seed)
        self.best = Schooled(copy.deepcopy(decoder).eval(), 0, val_mse)

    def learn(self, payloads: Tensor, images: Tensor) -> None:
        """Pass over all images once."""
        self.decoder.train()
        for some in torch.randperm(len(images), generator=self.generator).split(self.how.batch_size):
            if len(some) < 2:  # BatchNorm has nothing to measure in one image
                continue
            some = some.to(images.device)
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.decoder(payloads[some]), images[some]).backward()
            torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()

    def keep(self, epoch: int, val_mse: float) -> None:
        """Remember the decoder as it is, if it is better than before."""
        if val_mse < self.best.val_mse:
            self.best = Schooled(copy.deepcopy(self.decoder).eval(), epoch, val_mse)


def rebuilt(decoder: nn.Module, payloads: Tensor, batch_size: int = 256) -> Tensor:
    """Return what a decoder makes of payloads, in eval mode."""
    decoder.eval()
    with torch.no_grad():
        return torch.cat([decoder(some) for some in payloads.split(batch_size)])


def error_of(decoder: nn.Module, payloads: Tensor, images: Tensor, loss: Loss = F.mse_loss) -> float:
    """Return a decoder's error, in eval mode and double precision: mean squared of images, the loss of classes."""
    made = rebuilt(decoder, payloads)
    if images.is_floating_point():
        return (made - images).double().square().mean().item()
    return loss(made.double(), images).item()


def rate(step: int, steps: int) -> float:
    """Return the share of the highest learning rate at a step: a warm-up over a tenth of all, then half a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
