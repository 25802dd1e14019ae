"""Structural similarity of images, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RADIUS, SIGMA = 5, 0.3  # the deviation is in radii
K1, K2 = 0.01, 0.03


def structural_similarity(restored: Tensor, images: Tensor) -> Tensor:
    r"""Return the structural similarity (SSIM) of each pair of images from 0 to 1.

    .. math:: \mathrm{SSIM} = \frac{(2\mu_x\mu_y + C_1)(2\sigma_{xy} + C_2)}
              {(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)}

    eq. 13 of Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", 2004, with their Gaussian window of 11×11 and σ = 1.5, C₁ = 0.01² and C₂ = 0.03², averaged over all
    places, edges mirrored. Of images smaller than that the window is the largest odd one that fits, and σ less alike.

    Args:
        restored: (B, C, H, W), H and W at least 3.
        images: (B, C, H, W).

    Returns:
        (B,), the mean over places and channels; at most 1.

    Raises:
        ValueError: The shapes differ, or the images are smaller than 3 pixels.

    Example:
        >>> images = torch.rand(2, 3, 16, 16)
        >>> structural_similarity(images, images)
        tensor([1., 1.])
    """
    if restored.shape != images.shape:
        raise ValueError(f"restored {tuple(restored.shape)} and images {tuple(images.shape)} differ in shape")
    radius = min(RADIUS, (min(images.shape[-2:]) - 1) // 2)
    if radius < 1:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels have no structure; they need at least 3 a side")
    window = _window(radius, images)
    x, y = (F.pad(each, [radius] * 4, mode="reflect").flatten(0, 1)[:, None] for each in (restored, images))

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, window[None, None, :, None]), window[None, None, None, :])

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x * mean_x, mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found = above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return found.reshape(len(images), -1).mean(1)


def _window(radius: int, like: Tensor) -> Tensor:
    places = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    weights = (-places.square() / (2 * (SIGMA * radius) ** 2)).exp()
    return weights / weights.sum()
