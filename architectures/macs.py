"""What a module costs: multiply-accumulates (MACs) and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class MacCounter(TorchDispatchMode):
    """Counts the MACs of what runs while it is active, by the formulas of torch's FLOP counter.

    That counter itself also attributes them to modules, by hooks on gradients, which fails for some networks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flops = 0

    @property
    def total(self) -> int:
        """MACs so far: torch counts two floating-point operations for each of them."""
        return self._flops // 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add what it costs."""
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            # In inference mode operations arrive whole, before torch has taken them apart.
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if formula is not None:
            self._flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def counting_macs() -> Iterator[MacCounter]:
    """Count the MACs of whatever runs inside; gradients are off.

    The fused kernel that ``nn.MultiheadAttention`` takes in eval mode is unknown to torch's formulas, which would count
    nothing for it, and is switched off meanwhile.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), MacCounter() as counter:
            yield counter
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
        MACs, half the floating-point operations by the formulas of ``torch.utils.flop_counter``.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with counting_macs() as counter:
            module(*inputs)
        return counter.total
    finally:
        for part, training in modes:
            part.training = training


def count_params(module: nn.Module) -> int:
    """Count a module's parameters, each one once even where it is shared, buffers left out."""
    return sum(parameter.numel() for parameter in module.parameters())
