"""What may differ between a partition and the module it was made from, and measuring it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..codecs.codec import Codec
from ..codecs.packing import CodecError
from .files import BundleError


class ParityError(BundleError):
    """An exported partition that does not compute what its module computes."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a tensor may lie from the one it should equal.

    Args:
        value: Floats may differ by ``value + value·|y|``.
        steps: Integer codes may differ by this many steps …
        share: … in at most this share of the values.
    """

    value: float = 1e-5
    steps: int = 1
    share: float = 1e-4

    @classmethod
    def across_processors(cls, levels: int) -> Tolerance:
        """What another processor's float arithmetic, or another batch size's, may change in codes of some levels.

        A relative error of 1e-3 (TF32 convolutions have one) moves a value over a rounding edge the more often, and
        the further, the finer the steps are.
        """
        return cls(value=1e-3, steps=1 + int(1e-3 * levels), share=min(1.0, 1e-2 + 1e-3 * levels))


@dataclasses.dataclass(frozen=True)
class Parity:
    """Measured differences, over all the tensors compared.

    Args:
        max_difference: Largest absolute difference of a float value.
        codes_differing: Largest share of differing codes in one tensor, 0 to 1.
    """

    max_difference: float = 0.0
    codes_differing: float = 0.0

    def __or__(self, other: Parity) -> Parity:
        """Return the larger of both differences."""
        return Parity(max(self.max_difference, other.max_difference), max(self.codes_differing, other.codes_differing))


def compare(
    expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], where: str, tolerance: Tolerance | None = None
) -> Parity:
    """Compare the outputs of a partition with those expected of it.

    Args:
        expected: Tensors by name.
        actual: As many tensors under the same names, on any device.
        where: For the message: which partition, fed with what.
        tolerance: ``None`` is the export gate's: floats within 1e-5 + 1e-5·|y|, at most 1e-4 of the codes one step off.

    Returns:
        The differences.

    Raises:
        ParityError: A dtype or shape differs, or a value differs by more than the tolerance.
    """
    tolerance = tolerance or Tolerance()
    parity = Parity()
    for name, wanted in expected.items():
        found = actual[name].detach().cpu()
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ParityError(
                f"{where}: {name} is {found.dtype} {tuple(found.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
            )
        check = _compare_floats if wanted.is_floating_point() else _compare_codes
        parity |= check(wanted, found, f"{where}: {name}", tolerance)
    return parity


def through_bytes(codec: Codec, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Encode and decode what a partition emits for a codec, by the codec's own names.

    What a lossy codec does to codes is no difference between partitions: both sides of the gate are fed what arrived.

    Raises:
        ParityError: The codec cannot send them, or what arrives is not what was sent, of a lossy codec in dtype, shape
            and range.
    """
    try:
        received = codec.decode(codec.encode(tensors))
    except CodecError as error:
        raise ParityError(f"{where} emits what its codec cannot send: {error}") from error
    tolerance = Tolerance(steps=0, share=0.0) if codec.lossless else Tolerance(steps=codec.levels, share=1.0)
    compare({name: tensors[name] for name in codec.sends}, received, f"the bytes of {where}", tolerance)
    return received


def _compare_floats(wanted: Tensor, found: Tensor, where: str, tolerance: Tolerance) -> Parity:
    wanted, found = wanted.double(), found.double()
    if not (torch.isfinite(wanted).all() and torch.isfinite(found).all()):
        raise ParityError(f"{where} has values that are not finite")
    difference = (wanted - found).abs()
    largest = float(difference.max()) if difference.numel() else 0.0
    if (difference > tolerance.value * (1 + wanted.abs())).any():
        raise ParityError(f"{where} differs by up to {largest:.3g}, more than {tolerance.value:g}·(1 + |y|)")
    return Parity(max_difference=largest)


def _compare_codes(wanted: Tensor, found: Tensor, where: str, tolerance: Tolerance) -> Parity:
    steps = (wanted.long() - found.long()).abs()
    share = float((steps > 0).double().mean()) if steps.numel() else 0.0
    most = int(steps.max()) if steps.numel() else 0
    if most > tolerance.steps or share > tolerance.share:
        raise ParityError(
            f"{where} differs in {share:.2%} of the codes, by up to {most} steps; "
            f"allowed are {tolerance.share:.2%} and {tolerance.steps}"
        )
    return Parity(codes_differing=share)
