"""The depth of each weight in a backbone, as timm groups the layers of its models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def layer_depths(backbone: nn.Module) -> dict[str, int]:
    """Return the group of each weight by name, from 0 at the input on; nothing of a backbone that groups no layers.

    Args:
        backbone: A model of timm's, or another with a ``group_matcher``.
    """
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        return {}
    from timm.models import group_parameters

    return dict(group_parameters(backbone, matcher(coarse=False), reverse=True))


def depth_scales(depths: Mapping[str, int], decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each weight: ``decay`` for every group behind its own.

    Example:
        >>> depth_scales({"stem": 0, "layer": 1, "head": 2}, 0.5)
        {'stem': 0.25, 'layer': 0.5, 'head': 1.0}
    """
    deepest = max(depths.values(), default=0)
    return {name: decay ** (deepest - depth) for name, depth in depths.items()}
