"""Structural similarity of images, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def structural_similarity(restored: Tensor, images: Tensor) -> Tensor:
    r"""Return the mean structural similarity (SSIM) of two batches of images from 0 to 1.

    .. math:: \mathrm{SSIM} = \frac{(2\mu_x\mu_y + C_1)(2\sigma_{xy} + C_2)}
              {(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)}

    eq. 13 of Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", 2004, with their Gaussian window of 11×11 and σ = 1.5, C₁ = 0.01² and C₂ = 0.03², over all places where
    the window is inside the image. Of images smaller than that the window is the largest odd one that fits.

    Args:
        restored: (B, C, H, W).
        images: (B, C, H, W).

    Returns:
        Scalar, the mean over places, channels and images; at most 1.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> images = torch.rand(2, 3, 16, 16)
        >>> structural_similarity(images, images)
        tensor(1.)
    """
    if restored.shape != images.shape:
        raise ValueError(f"restored {tuple(restored.shape)} and images {tuple(images.shape)} differ in shape")
    rows, columns = (_window(min(WINDOW, side - 1 + side % 2), images) for side in images.shape[-2:])
    shape = images.shape
    x, y = (each.reshape(-1, 1, *shape[-2:]) for each in (restored, images))

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, rows[None, None, :, None]), columns[None, None, None, :])

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x * mean_x, mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def _window(size: int, like: Tensor) -> Tensor:
    places = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    weights = (-places.square() / (2 * SIGMA**2)).exp()
    return weights / weights.sum()
