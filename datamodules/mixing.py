"""Mixup and CutMix: training images made of two, with labels in the same shares."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .drawing import draw

_SHARE, _WHICH, _ROW, _COLUMN = 101, 102, 103, 104  # streams of random numbers, apart from those of augmentations


class Mixing:
    r"""Mixes each image of a batch with the one before it.

    Mixup (Zhang et al. 2018) takes :math:`\lambda x + (1 - \lambda) x'`, CutMix (Yun et al. 2019) puts a rectangle of
    :math:`x'` with the share :math:`1 - \lambda` of the area into :math:`x`; the labels become probabilities,
    :math:`\lambda y + (1 - \lambda) y'`. :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)` is drawn once a batch, as
    torchvision does, from the first image's seed: equal batches are mixed alike, also behind a resume.

    Args:
        mixup: Mixup's alpha; 0 leaves it out.
        cutmix: CutMix's alpha; 0 leaves it out. With both, each batch is mixed by one of them, at even odds.
        classes: Number of classes.

    Raises:
        ValueError: An alpha is negative or no number, or there are no classes.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int) -> None:
        check_alphas(mixup, cutmix)
        if classes < 2:
            raise ValueError(f"mixup={mixup} and cutmix={cutmix} mix labels, which these images lack; set both to 0")
        self.mixup, self.cutmix, self.classes = mixup, cutmix, classes

    def __call__(self, images: Tensor, labels: Tensor, seeds: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: uint8 (B, C, H, W).
            labels: int64 (B,).
            seeds: One uint64 seed for each image, of which the first counts.

        Returns:
            Images as before, and float32 labels (B, classes), which sum to 1.
        """
        first = seeds[:1]
        cuts = self.cutmix > 0 and (self.mixup == 0 or bool(draw(first, _WHICH)[0] >> np.uint64(63)))
        alpha = self.cutmix if cuts else self.mixup
        share = float(np.random.default_rng(int(draw(first, _SHARE)[0])).beta(alpha, alpha))
        if cuts:
            images, share = self._cut(images, share, first)
        else:
            mixed = images.float().mul_(share).add_(images.roll(1, 0).float(), alpha=1 - share)
            images = mixed.round_().clamp_(0, 255).to(torch.uint8)
        targets = F.one_hot(labels, self.classes).float()
        return images, targets.mul(share).add_(targets.roll(1, 0), alpha=1 - share)

    def _cut(self, images: Tensor, share: float, first: np.ndarray) -> tuple[Tensor, float]:
        """Put in a rectangle around a random point; at the edges it is smaller, and its share too."""
        height, width = images.shape[-2:]
        row, column = int(draw(first, _ROW)[0] % np.uint64(height)), int(draw(first, _COLUMN)[0] % np.uint64(width))
        half = 0.5 * math.sqrt(1 - share)
        top, bottom = max(row - int(half * height), 0), min(row + int(half * height), height)
        left, right = max(column - int(half * width), 0), min(column + int(half * width), width)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def check_alphas(mixup: Any, cutmix: Any) -> None:
    """Raise a ValueError unless both are finite numbers of at least 0."""
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, such as 0.2, got {value!r}")
