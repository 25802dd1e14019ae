"""What published methods name their terms after: bottlenecks, and the layers that a loss compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.learning import check_network

LOGITS = "logits"


def by_bottleneck(network: StagedNetwork, method: str, name: str) -> dict[str, str]:
    """Return a term's name for each bottleneck, which is that of its layer as well where there are several.

    Args:
        network: The network.
        method: Name of the method, for the message.
        name: Name of the term.

    Returns:
        The cuts by the names.

    Raises:
        TypeError: The network is not made of stages.
        ValueError: It has no bottleneck.
    """
    check_network(network, method)
    cuts = tuple(network.bottlenecks)
    if not cuts:
        raise ValueError(f"{method} trains a bottleneck, which this network lacks; set split.at")
    return {name if len(cuts) == 1 else f"{name}/{cut}": cut for cut in cuts}


def compared_layers(loss: Mapping[str, Any] | None) -> list[str]:
    """Return the layers that a loss compares, by the weights in its config."""
    weights = (loss or {}).get("weights") or {}
    return [layer for layer, weight in weights.items() if weight and layer != LOGITS]
