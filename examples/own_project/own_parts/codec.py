"""A codec: a quantiser, which makes integer codes of a representation, and says how they become bytes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from cleave.architectures import UniformQuantizer


class DeadZoneQuantizer(UniformQuantizer):
    """Uniform codes of what is left once small values were drawn to 0, whose codes then take few bytes.

    The device sends ordinary codes, so that bundles run without this class.

    Args:
        bits: Width of a code.
        dead_zone: Half-width of the zone around 0 that becomes 0.
    """

    def __init__(self, bits: int, dead_zone: float) -> None:
        super().__init__(bits, coding="packed_zstd")
        self.dead_zone = dead_zone

    def forward(self, z: Tensor) -> Tensor:
        """Return the de-quantised representation, as training sees it."""
        return super().forward(F.softshrink(z, self.dead_zone))

    def encode(self, z: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the codes and their range, as the device sends them."""
        return super().encode(F.softshrink(z, self.dead_zone), levels)

    send = encode


def dead_zone_codec(shape: Sequence[int], axis: int = 0, *, bits: int = 4, dead_zone: float = 0.5) -> DeadZoneQuantizer:
    """Build the quantiser for a representation of a shape, whose channels stand at an axis."""
    return DeadZoneQuantizer(bits, dead_zone)
