"""The two ends of a network: find and replace its classifier and the convolution that reads the image."""

from __future__ import annotations

import torch
from torch import nn


def find_classifier(network: nn.Module, num_classes: int | None = None) -> str | None:
    """Name the classifier: the last linear layer or convolution in the order of registration.

    Args:
        network: A classification network.
        num_classes: Where given, only layers with that many outputs count.

    Returns:
        The module's name, or ``None`` where there is none.
    """
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and num_classes in (None, module.weight.shape[0])
    ]
    return found[-1] if found else None


def find_input_convolution(network: nn.Module) -> str | None:
    """Name the convolution that reads the image: the first one, if it reads 1 or 3 channels in one group."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return name if module.in_channels in (1, 3) and module.groups == 1 else None
    return None


def replace_classifier(network: nn.Module, name: str, num_classes: int) -> None:
    """Put a fresh layer with ``num_classes`` outputs in place of a linear or 1×1-convolution classifier.

    Args:
        network: Network to change in place.
        name: Module name of the classifier.
        num_classes: Outputs of the new layer.
    """
    old = network.get_submodule(name)
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=old.bias is not None)  # type: ignore[arg-type]
    else:
        raise ValueError(f"the classifier {name!r} is {type(old).__name__}, not a linear layer or a convolution")
    network.set_submodule(name, new)


def use_grey_input(network: nn.Module) -> None:
    """Replace the RGB input convolution by one for grey images, whose kernels are the sums over the colours.

    The response to a grey picture stays the same.

    Args:
        network: Network to change in place.

    Raises:
        ValueError: The network does not begin with a convolution over three channels.
    """
    name = find_input_convolution(network)
    old = network.get_submodule(name) if name else None
    if not isinstance(old, nn.Conv2d) or old.in_channels != 3 or name is None:
        raise ValueError(f"{type(network).__name__} has no RGB input convolution to adapt to in_channels=1")
    new = nn.Conv2d(
        1,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        new.weight.copy_(old.weight.sum(dim=1, keepdim=True))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    network.set_submodule(name, new)
