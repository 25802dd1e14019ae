"""How near rebuilt images come to the true ones, image by image, and intervals over images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from cleave.losses import structural_similarity

Features = Callable[[Tensor], Tensor]
_MOST_PSNR = 100.0  # decibels of a difference below a thousandth of a level of 8 bits
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over images, with its 95 % bootstrap interval.

    Attributes:
        value: The mean.
        low: 2.5 % of the means of resampled images lie below.
        high: 2.5 % lie above.
    """

    value: float
    low: float
    high: float


def per_image(rebuilt: Tensor, images: Tensor, features: Features | None = None) -> dict[str, Tensor]:
    """Return each image's figures, float64 (N,).

    ``mse``, the mean squared error; ``psnr`` in decibels, at most 100; ``ssim``, with the Gaussian window of Wang et
    al., 2004, of 11 pixels or as many as fit, left out below 3; ``features``, 1 − the cosine of
    what a network makes of both.

    Args:
        rebuilt: (N, C, H, W) from 0 to 1.
        images: The true ones.
        features: Maps images from 0 to 1 to features (N, ...); ``None`` leaves that distance out.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> figures = per_image(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.1))
        >>> round(figures["psnr"].item())
        20
    """
    if rebuilt.shape != images.shape:
        raise ValueError(f"rebuilt is {tuple(rebuilt.shape)} and images {tuple(images.shape)}; give images in pairs")
    parts = [_of_batch(*some, features) for some in zip(rebuilt.split(_BATCH), images.split(_BATCH), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_batch(rebuilt: Tensor, images: Tensor, features: Features | None) -> dict[str, Tensor]:
    rebuilt, images = rebuilt.double(), images.double()
    mse = (rebuilt - images).square().flatten(1).mean(1)
    found = {"mse": mse, "psnr": -10 * mse.clamp_min(10 ** (-_MOST_PSNR / 10)).log10()}
    if min(images.shape[2:]) > 2:
        found["ssim"] = structural_similarity(rebuilt, images)
    if features is not None:
        made, true = (features(each.float()).double().flatten(1) for each in (rebuilt, images))
        found["features"] = 1 - F.cosine_similarity(made, true, dim=1)
    return found


def intervals(figures: Mapping[str, Tensor], mean_mse: Tensor, resamples: int, seed: int = 0) -> dict[str, Interval]:
    """Return the mean of each figure with its interval, and ``explained``.

    1 − MSE/MSE(mean image): 1 is a full leak, 0 none. Both errors are of the same resampled images.

    Args:
        figures: Of :func:`per_image`, ``mse`` among them.
        mean_mse: The mean image's squared error on the same images, (N,).
        resamples: How often images are drawn with replacement.
        seed: Of these draws.

    Raises:
        ValueError: ``resamples`` is below 1, there are no images, or each of them is the mean image.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}; 2000 is usual")
    if not mean_mse.sum() > 0:
        raise ValueError("there are no images, or all are the mean image, so nothing is left to explain; give others")
    names = [*figures, "mean"]
    values = torch.stack([*(figures[name].double().cpu() for name in figures), mean_mse.double().cpu()])
    drawn = resampled_means(values, resamples, seed)
    found = {name: interval(values[i].mean(), drawn[i]) for i, name in enumerate(names[:-1])}
    place = names.index("mse")
    ratio = values[place].mean() / values[-1].mean()
    return found | {"explained": interval(1 - ratio, 1 - drawn[place] / drawn[-1])}


def mean_interval(values: Tensor, resamples: int, seed: int = 0) -> Interval:
    """Return the mean of values (N,) with its interval.

    Raises:
        ValueError: There are none, or ``resamples`` is below 1.
    """
    if resamples < 1 or not len(values):
        raise ValueError(f"an interval needs values and resamples, got {len(values)} and {resamples}")
    values = values.double().cpu()
    return interval(values.mean(), resampled_means(values[None], resamples, seed)[0])


def resampled_means(values: Tensor, resamples: int, seed: int) -> Tensor:
    """Return the means of rows (R, N) over columns drawn with replacement, (R, resamples)."""
    generator = torch.Generator().manual_seed(seed)
    count = values.shape[1]
    means = []
    for _ in range(resamples):
        means.append(values[:, torch.randint(count, (count,), generator=generator)].mean(1))
    return torch.stack(means, 1)


def interval(value: Tensor, drawn: Tensor) -> Interval:
    """Return a figure with the middle 95 % of what it was of resampled images."""
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Interval(value.item(), low, high)
