"""Normalisation of maps by a name: over the batch, or within each sample."""

from __future__ import annotations

import math

from torch import nn

from cleave.architectures.naming import did_you_mean

NORMS = ("batch", "group")
_MOST_GROUPS = 8


def norm_of(kind: str, channels: int) -> nn.Module:
    """Return BatchNorm, or GroupNorm, which knows no other sample and so suits differentially private training.

    Args:
        kind: ``batch`` or ``group``: up to 8 groups, as many as divide the channels evenly (Wu and He 2018, "Group
            Normalization").
        channels: Channels of the maps.

    Raises:
        ValueError: There is no such norm.

    Example:
        >>> norm_of("group", 12).num_groups
        4
    """
    if kind not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {kind!r}.{did_you_mean(str(kind), NORMS)}")
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(_MOST_GROUPS, channels), channels)
