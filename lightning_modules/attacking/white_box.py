"""The attack of an adversary who has the device's network: it searches for the image whose payload is the one sent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cleave.lightning_modules.attacking.releases import NetworkReleases


def white_box(
    releases: NetworkReleases, payloads: Tensor, start: Tensor, *, steps: int, lr: float, tv: float, scale: Tensor
) -> Tensor:
    r"""Return images whose payloads come near to those given, found by Adam on the images.

    .. math:: \min_{x \in [0, 1]} \lVert (s(x) - s) / \sigma \rVert^2 / n + \lambda\, TV(x)

    as He, Zhang and Lee, "Model Inversion Attacks Against Collaborative Inference", 2019, do it. The gradient passes
    the rounding unchanged, and the adversary draws noise of its own at every step, which averages over it.

    Args:
        releases: The path, whose weights the adversary has.
        payloads: What was sent, (B, ...).
        start: The image that the search starts from, (C, H, W) from 0 to 1.
        steps: Steps of Adam.
        lr: Its first rate, which falls to 0.
        tv: λ ≥ 0, weight of the total variation: the mean difference of neighbouring pixels.
        scale: What the difference of payloads is divided by, such as their standard deviation.

    Returns:
        The images, (B, C, H, W) from 0 to 1.
    """
    images = start.expand(len(payloads), *start.shape).clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=lr)
    weights = [weight for weight in releases.network.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            difference = (passed_through(releases, images) - payloads) / scale
            # Summed over images, which do not know of one another.
            loss = difference.square().flatten(1).mean(1).sum() + tv * total_variation(images).sum()
            (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
            with torch.no_grad():
                images.clamp_(0, 1)
    finally:
        for weight in weights:
            weight.requires_grad_(True)
    return images.detach()


def passed_through(releases: NetworkReleases, images: Tensor) -> Tensor:
    """Return what is sent of images from 0 to 1, with the gradient passed through the rounding unchanged."""
    name = f"{releases.at}/{releases.bottleneck.quantised}"
    z = releases.network.outputs(releases.image_input.normalize(255 * images), [name])[name].float()
    return z + (releases.bottleneck.quantise(z) - z).detach()


def total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels of each image, (B,)."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1)
    across = (images[..., 1:] - images[..., :-1]).abs().flatten(1)
    return torch.cat([down, across], 1).mean(1)
