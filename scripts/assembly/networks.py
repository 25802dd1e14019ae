"""From a backbone to the network that a config describes."""

from __future__ import annotations

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from cleave.deployment import ImageInput


def build_network(cfg: DictConfig, backbone: nn.Module, image_input: ImageInput) -> nn.Module:
    """Inject what ``cfg.network`` describes into the backbone; the backbone itself where it describes nothing."""
    if cfg.network is None:
        return backbone
    # A partial takes the modules as they are; instantiate would hand over copies of them.
    build = instantiate(cfg.network, _partial_=True, _convert_="all")
    return build(backbone=backbone, sample=_sample(image_input))


def _sample(image_input: ImageInput) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *image_input.shape, generator=generator)
