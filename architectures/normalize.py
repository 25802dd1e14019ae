"""Normalisation as part of a network: what the first partition begins with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cleave.deployment import ImageInput


class Normalize(nn.Module):
    """uint8 images (B, C, H, W) to normalised float32, by ``ImageInput.normalize``."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_input: ImageInput) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(image_input.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(image_input.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images."""
        return (images.to(torch.float32) / 255.0 - self.mean) / self.std
