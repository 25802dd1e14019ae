"""The parity gate: files on disk against the modules they were made from, through real bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.codec import Codec
from ..codecs.packing import MIN_BITS, CodecError
from .files import BundleError
from .loading import Bundle
from .parity import Parity, ParityError, Tolerance, compare
from .signatures import EXIT_LOGITS, part_arguments


def run_module(
    module: nn.Module, arguments: Mapping[str, Tensor], outputs: Sequence[str], name: str
) -> dict[str, Tensor]:
    """Run a module on named arguments, by position, and name what it returns.

    Raises:
        BundleError: It does not return as many tensors as ``outputs`` has names, or one without the batch.
    """
    with torch.no_grad():
        result = module(*arguments.values())
    results = result if isinstance(result, tuple) else (result,)
    if len(results) != len(outputs) or not all(isinstance(item, Tensor) for item in results):
        found = [type(item).__name__ for item in results]
        raise BundleError(f"partition {name} must return the tensors {', '.join(outputs)}, it returned {found}")
    batch = len(next(iter(arguments.values())))
    for output, tensor in zip(outputs, results, strict=True):
        if tensor.ndim == 0 or len(tensor) != batch:
            raise BundleError(
                f"partition {name}: {output} must begin with the batch of {batch}, got {list(tensor.shape)}"
            )
    return dict(zip(outputs, results, strict=True))


def parity_gate(bundle: Bundle, modules: Sequence[nn.Module], images: Tensor) -> dict[str, Any]:
    """Compare every loaded partition with its module, both fed the same inputs.

    Run with the whole batch, with one image, with one inverted image, and at the least number of bits where codes are
    sent. What a part sends passes through its codec, and the next part takes what arrived; nobody leaves early.

    Args:
        bundle: Loaded from disk.
        modules: The modules in the order of the route, on the CPU in eval mode.
        images: uint8 (B, C, H, W), at least 2.

    Returns:
        What was measured, for the manifest: ``max_difference``, ``codes_differing`` and ``batches``.

    Raises:
        ParityError: A partition differs by more than 1e-5 + 1e-5·|y|, or in more than 1e-4 of its codes, or in any by
            more than one step; it fails at another batch size; or a sample's outputs depend on its neighbours.
    """
    codecs = bundle.manifest.codecs
    coarse = [codec.with_bits(MIN_BITS) if codec.levels else codec for codec in codecs]
    parity = Parity()
    for batch in (images, images[:1], 255 - images[-1:]):
        parity |= _run(bundle, modules, codecs, batch)
    if any(codec.levels for codec in codecs):
        parity |= _run(bundle, modules, coarse, images)
    return {
        "max_difference": parity.max_difference,
        "codes_differing": parity.codes_differing,
        "batches": [len(images), 1],
    }


def first_sample(arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a partition's arguments to a batch of one; scalars, such as the number of levels, have no batch."""
    return {name: tensor[:1] if tensor.ndim else tensor for name, tensor in arguments.items()}


def _run(bundle: Bundle, modules: Sequence[nn.Module], codecs: Sequence[Codec], images: Tensor) -> Parity:
    parity = Parity()
    received: dict[str, Tensor] = {"images": images}
    before: Tensor | None = None
    for index, (name, module) in enumerate(zip(bundle.manifest.route, modules, strict=True)):
        codec = codecs[index] if index < len(codecs) else None
        where = f"partition {name} with a batch of {len(images)}"
        if codec and codec.levels:
            where += f" at {codec.bits} bits"
        partition = bundle.partitions[name]
        _, _, inputs, outputs = partition.spec.signature
        arguments = part_arguments(inputs, received, codec, before)
        expected = run_module(module, arguments, outputs, name)
        try:
            actual = partition(arguments)
        except (RuntimeError, BundleError) as error:
            raise ParityError(f"{where} does not run once it is traced: {error}") from error
        parity |= compare(expected, actual, where)
        _check_alone(module, arguments, expected, codec, name)
        if codec:
            received, before = through_bytes(codec, actual, where), actual.get(EXIT_LOGITS, before)
    return parity


def through_bytes(codec: Codec, outputs: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Encode and decode a partition's outputs.

    What a lossy codec does to codes is no difference between partitions: both sides of the gate are fed what arrived.

    Raises:
        ParityError: The codec cannot send them, or what arrives is not what was sent, of a lossy codec in dtype, shape
            and range.
    """
    try:
        received = codec.decode(codec.encode(outputs))
    except CodecError as error:
        raise ParityError(f"{where} emits what its codec cannot send: {error}") from error
    sent = {name: outputs[name] for name in codec.sends}
    tolerance = Tolerance(steps=0, share=0.0) if codec.lossless else Tolerance(steps=codec.levels, share=1.0)
    compare(sent, received, f"the bytes of {where}", tolerance)
    return received


def _check_alone(
    module: nn.Module, arguments: Mapping[str, Tensor], outputs: Mapping[str, Tensor], codec: Codec | None, name: str
) -> None:
    """Check that the first sample's outputs are the same alone as in its batch, up to float noise."""
    alone = run_module(module, first_sample(arguments), list(outputs), name)
    tolerance = Tolerance.across_processors(codec.levels if codec else 0)
    try:
        compare(first_sample(outputs), alone, f"partition {name}", tolerance)
    except ParityError as error:
        raise ParityError(f"a sample's outputs depend on the others in its batch: {error}") from None
