"""What a module costs: multiply-accumulates (MACs) and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class MacCounter:
    """Running count of the MACs of convolutions, matrix products and attention; see :func:`counting_macs`."""

    def __init__(self, flops: FlopCounterMode) -> None:
        self._flops = flops

    @property
    def total(self) -> int:
        """MACs so far: torch counts two floating-point operations for each of them."""
        return self._flops.get_total_flops() // 2


@contextmanager
def counting_macs() -> Iterator[MacCounter]:
    """Count the MACs of whatever runs inside.

    The fused kernel that ``nn.MultiheadAttention`` takes in eval mode is unknown to torch's counter, which would count
    nothing for it, and is switched off meanwhile.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as flops:
            yield MacCounter(flops)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def count_macs(module: nn.Module, *inputs: Any) -> int:
    """Count the multiply-accumulates of one forward pass in eval mode.

    Convolutions, matrix products and attention count; what is linear in the number of values (bias, norm, activation,
    pooling) does not, as is customary. The module is left as it was: no gradients, and every part keeps its mode.

    Args:
        module: Any module.
        *inputs: What its ``forward`` takes; the count is for the whole batch.

    Returns:
        MACs, half of what torch's FLOP counter reports.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with torch.no_grad(), counting_macs() as counter:
            module(*inputs)
        return counter.total
    finally:
        for part, training in modes:
            part.training = training


def count_params(module: nn.Module) -> int:
    """Count a module's parameters, each one once even where it is shared, buffers left out."""
    return sum(parameter.numel() for parameter in module.parameters())
