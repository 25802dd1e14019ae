"""What the parts of a network cost."""

from __future__ import annotations

import torch
from torch import nn

from cleave.architectures.macs import count_macs, count_params
from cleave.architectures.multi_exit import MultiExitNetwork
from cleave.architectures.split import SplitNetwork


def profile(network: nn.Module, shape: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    """MACs per image and parameters of each part of a network.

    Args:
        network: A split or multi-exit network, profiled part by part, or any other, profiled as ``whole``.
        shape: Shape (C, H, W) of an image.

    Returns:
        ``{part: {"macs": …, "params": …}}`` in the order of execution.
    """
    if isinstance(network, SplitNetwork | MultiExitNetwork):
        return network.profile()
    weight = next(network.parameters())
    image = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
    return {"whole": {"macs": count_macs(network, image), "params": count_params(network)}}
