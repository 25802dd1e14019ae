"""Training of a critic by InfoNCE, on an adversary's own images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cleave.architectures.attacking.critic import Critic
from cleave.lightning_modules.attacking.training import Schooling, rate
from cleave.losses import InfoNCELoss, information_below

Payloads = Callable[[], Tensor]


def train_critic(
    critic: Critic, payloads: Payloads, images: Tensor, val_payloads: Tensor, val_images: Tensor, how: Schooling
) -> tuple[Critic, int]:
    """Train a critic, and return it as it was at the epoch that the adversary's validation images choose.

    Args:
        critic: The critic, on the device where all tensors are.
        payloads: Called once an epoch for what is sent of the training images, (N, ...); noise is drawn anew.
        images: The training images, (N, C, H, W) from 0 to 1.
        val_payloads: What is sent of the validation images.
        val_images: These, from 0 to 1.
        how: How it is trained; a batch holds the images among which the right one is found.

    Returns:
        The critic in eval mode, and its epoch; 0: it never was better than at first.
    """
    size = min(how.batch_size, len(images))
    steps = how.epochs * max(1, len(images) // size)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=how.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    generator = torch.Generator().manual_seed(how.seed)
    loss = InfoNCELoss()

    def chosen_by() -> float:
        return torch.stack(bounds(critic, val_images, val_payloads, how.batch_size, how.seed)).mean().item()

    best, most, epoch_of_best = copy.deepcopy(critic), chosen_by(), 0
    for epoch in range(1, how.epochs + 1):
        critic.train()
        sent = payloads()
        for some in torch.randperm(len(images), generator=generator).split(size):
            if len(some) < size:  # fewer images are another task
                continue
            some = some.to(images.device)
            optimizer.zero_grad(set_to_none=True)
            loss(critic(images[some], sent[some])).backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if (found := chosen_by()) > most:
            best, most, epoch_of_best = copy.deepcopy(critic), found, epoch
    return best.eval(), epoch_of_best


@torch.no_grad()
def bounds(critic: Critic, images: Tensor, payloads: Tensor, batch: int, seed: int) -> list[Tensor]:
    """Return what InfoNCE says from below in each whole batch of images in a drawn order, in bits.

    Args:
        critic: The critic.
        images: From 0 to 1; at least 2.
        payloads: What is sent of them.
        batch: Images in a batch; all, where there are fewer.
        seed: Of the order.
    """
    critic.eval()
    return [information_below(critic(images[some], payloads[some])) for some in batches(len(images), batch, seed)]


def batches(count: int, batch: int, seed: int) -> list[Tensor]:
    """Return whole batches of places in a drawn order; one of all where there are fewer than a batch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    size = min(batch, count)
    return [some for some in order.split(size) if len(some) == size]


def ceiling(count: int, batch: int) -> float:
    """Return the most that InfoNCE can say of so many images, in bits: the logarithm of a batch."""
    return math.log2(min(count, batch))
