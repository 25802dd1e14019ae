"""Training exits on a backbone that stays as it is."""

from __future__ import annotations

from typing import Any

from cleave.architectures.multi_exit import MultiExitNetwork
from cleave.lightning_modules.methods.exits_joint import ExitsJoint


class ExitsSeparate(ExitsJoint):
    """Cross entropy of the exits alone; the backbone is frozen for good, its running statistics included.

    All heads learn at once, or with ``train=[exit2]`` one at a time, as stages of a recipe. With
    ``feature_cache.use`` the backbone runs once for the whole training.

    Args:
        network: The multi-exit network to train.
        *args: As of :class:`~cleave.lightning_modules.methods.exits_joint.ExitsJoint`.
        **kwargs: As of :class:`~cleave.lightning_modules.methods.exits_joint.ExitsJoint`.

    Raises:
        ValueError: ``train`` names the backbone or the bottleneck.
    """

    trains = ("heads",)

    def __init__(self, network: MultiExitNetwork, *args: Any, **kwargs: Any) -> None:
        super().__init__(network, *args, **kwargs)
        if learning := [name for name in ("backbone", "bottleneck") if name in self.trained_parts]:
            raise ValueError(
                f"train names {learning[0]!r}, which separate training keeps frozen; use method=exits_joint, or leave "
                "it out"
            )
