"""The critic that says how well an image and a payload go together."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cleave.architectures.attacking.decoders import MOST_WEIGHTS, dense

_WIDTH, _HIDDEN, _FEATURES = 32, 256, 64


class Critic(nn.Module):
    """Scores every pair of a batch of images and a batch of payloads, by the product of what two networks make of them.

    Args:
        images: The adversary's training images (N, C, H, W) from 0 to 1, which are centred and scaled.
        payloads: What is sent of them, (N, ...); scaled by one number, as the elements of a payload may differ.
        most_weights: Of one linear layer; what would have more becomes two, narrow in the middle.

    Shape:
        - images: (B, C, H, W).
        - payloads: (B, ...).
        - output: (B, B); row i holds the scores of payload i with every image.

    Example:
        >>> critic = Critic(torch.rand(6, 1, 8, 8), torch.rand(6, 4, 2, 2))
        >>> critic(torch.rand(5, 1, 8, 8), torch.rand(5, 4, 2, 2)).shape
        torch.Size([5, 5])
    """

    image_center: Tensor
    image_scale: Tensor
    payload_center: Tensor
    payload_scale: Tensor

    def __init__(self, images: Tensor, payloads: Tensor, most_weights: int = MOST_WEIGHTS) -> None:
        super().__init__()
        for name, values in (("image", images), ("payload", payloads.float())):
            self.register_buffer(f"{name}_center", values.mean(0))
            spread = (values - values.mean(0)).square().mean().sqrt()
            self.register_buffer(f"{name}_scale", torch.where(spread > 1e-6, 1 / spread.clamp_min(1e-6), 0.0))
        channels, *size = images.shape[1:]
        layers: list[nn.Module] = []
        while min(size) > 4:
            layers += [nn.Conv2d(channels, _WIDTH, 3, stride=2, padding=1), nn.ReLU()]
            channels, size = _WIDTH, [math.ceil(each / 2) for each in size]
        self.of_image = nn.Sequential(*layers, *_to_features(channels * math.prod(size), most_weights))
        self.of_payload = nn.Sequential(*_to_features(math.prod(payloads.shape[1:]), most_weights))

    def forward(self, images: Tensor, payloads: Tensor) -> Tensor:
        """Return the scores of all pairs."""
        of_images = self.of_image((images - self.image_center) * self.image_scale)
        of_payloads = self.of_payload((payloads.float() - self.payload_center) * self.payload_scale)
        return of_payloads @ of_images.T / math.sqrt(_FEATURES)


def _to_features(inputs: int, most_weights: int) -> list[nn.Module]:
    hidden = dense(inputs, _HIDDEN, most_weights)
    return [nn.Flatten(), hidden, nn.ReLU(), nn.Linear(_HIDDEN, _FEATURES)]
