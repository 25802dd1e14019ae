"""The quantisers by the settings of a codec: what a config names as ``codec``."""

from __future__ import annotations

from collections.abc import Sequence

from cleave.architectures.inserts.entropy_bottleneck import EntropyBottleneck
from cleave.architectures.inserts.quantizer import Quantizer, UniformQuantizer, Unquantized
from cleave.deployment import FLOAT_BITS, check_bits
from cleave.deployment.codecs.entropy_codec import check_coder


def uniform_codec(
    shape: Sequence[int],
    axis: int = 0,
    *,
    bits: int = 8,
    range: str = "observed",  # noqa: A002
    momentum: float | None = None,
    coding: str = "packed",
    quality: int | None = None,
    widths: Sequence[int] | None = None,
) -> Quantizer:
    """Build a uniform quantiser for a representation, or none for 32 bits.

    Args:
        shape: Per-sample shape of the representation.
        axis: Where its channels stand, 0 or -1.
        bits: Width of a code, 2 to 16, or 32 for float.
        range: As of :class:`~cleave.architectures.UniformQuantizer`.
        momentum: As of :class:`~cleave.architectures.UniformQuantizer`.
        coding: How codes become bytes; see :func:`cleave.deployment.code_codec`.
        quality: Of a lossy image codec among the codings.
        widths: Several bits that one network is trained for; ``bits`` is then the one that is validated.

    Raises:
        ValueError: An argument is out of range, or has no meaning for floats.
    """
    if check_bits(bits) != FLOAT_BITS:
        return UniformQuantizer(bits, range, momentum, coding, quality, widths)
    UniformQuantizer(8, range, momentum)  # its other settings are checked all the same
    if widths:
        raise ValueError(f"bits={bits} must be one of widths={list(widths)}: it is the one validated")
    if coding != "packed" or quality is not None:
        raise ValueError(f"coding={coding} codes integers, but bits=32 sends float32; use 2 to 16 bits")
    return Unquantized()


def entropy_codec(
    shape: Sequence[int], axis: int = 0, *, filters: Sequence[int] = (3, 3, 3), init_scale: float = 10.0
) -> EntropyBottleneck:
    """Build a learned prior for a representation.

    Args:
        shape: Per-sample shape of the representation.
        axis: Where its channels stand, 0 or -1.
        filters: As of :class:`~cleave.architectures.EntropyBottleneck`.
        init_scale: As of :class:`~cleave.architectures.EntropyBottleneck`.

    Raises:
        ValueError: An argument is out of range; or the package ``constriction`` is missing, without which nothing could
            be tested or sent after all the training.
    """
    check_coder()
    return EntropyBottleneck(shape[axis], axis, filters, init_scale)
