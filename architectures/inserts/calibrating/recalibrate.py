"""BatchNorm statistics, measured again after what stands before them has changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cleave.architectures.inserts.finite import check_finite
from cleave.architectures.inserts.switchable import SwitchableBatchNorm2d
from cleave.architectures.modes import evaluating


@torch.no_grad()
def recalibrate_batchnorm(network: nn.Module, part: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of a part's BatchNorm layers by those of ``batches``.

    After the number of bits changes, the decoder sees other values than the ones its BatchNorm layers averaged in
    training. The statistics become the plain average over the batches (momentum ``None``), everything else stays in
    eval mode, and no weight changes.

    Args:
        network: Network whose forward pass feeds the part.
        part: Module inside ``network`` whose BatchNorm layers are measured again.
        batches: Inputs of the network (B, …); each B at least 2.

    Returns:
        The number of BatchNorm layers measured; 0 changes nothing and reads no batch.

    Raises:
        NumberError: What is measured is not finite.
        ValueError: ``batches`` is empty, so that there is nothing to measure.
    """
    idle = {norm for each in part.modules() if isinstance(each, SwitchableBatchNorm2d) for norm in each.idle()}
    layers = [m for m in part.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m not in idle]
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    seen = 0
    with evaluating(network):
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None
                layer.train()
            for batch in batches:
                network(batch)
                seen += 1
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    if not seen:
        raise ValueError("recalibration needs at least one batch, got none; give more batches or check the data")
    for layer in layers:
        for statistic in layer.buffers():
            check_finite(statistic, "a BatchNorm statistic that was measured again")
    return len(layers)
