"""The parity gate: files on disk against the modules they were made from, through real bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...codecs.codec import Codec
from ...codecs.packing import MIN_BITS
from ...precision import autocast_off
from ...runtime.walk import Walk, walk_all
from ..edges import Crossing
from ..files import BundleError
from ..loading import Bundle
from ..parity import Parity, ParityError, Tolerance, compare, through_bytes
from ..route import Route
from ..specs import TensorSpec


def run_module(
    module: nn.Module, arguments: Mapping[str, Tensor], outputs: Sequence[str], name: str
) -> dict[str, Tensor]:
    """Run a module on named arguments, by position, and name what it returns.

    Raises:
        BundleError: It cannot compute with the arguments, does not return as many tensors as ``outputs`` has names, or
            one without the batch.
    """
    try:
        with torch.no_grad(), autocast_off(torch.device("cpu")):
            result = module(*arguments.values())
    except torch.OutOfMemoryError:
        raise
    # What stands in a module is the user's own code, which may raise anything.
    except Exception as error:
        given = ", ".join(f"{key} {TensorSpec.of(key, x).dtype} {list(x.shape)}" for key, x in arguments.items())
        raise BundleError(f"partition {name} cannot compute with {given}: {error}{_other_types(module)}") from error
    results = result if isinstance(result, tuple) else (result,)
    if len(results) != len(outputs) or not all(isinstance(item, Tensor) for item in results):
        found = [type(item).__name__ for item in results]
        raise BundleError(f"partition {name} must return the tensors {', '.join(outputs)}, it returned {found}")
    batch = next(len(tensor) for tensor in arguments.values() if tensor.ndim)
    for output, tensor in zip(outputs, results, strict=True):
        if tensor.ndim == 0 or len(tensor) != batch:
            raise BundleError(
                f"partition {name}: {output} must begin with the batch of {batch}, got {list(tensor.shape)}"
            )
    return dict(zip(outputs, results, strict=True))


def _other_types(module: nn.Module) -> str:
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in module.parameters() if tensor.is_floating_point()}
    other = sorted(types - {"float32"})
    return f" (its parameters are {', '.join(other)}; a partition computes in float32: call .float())" if other else ""


class Gate(Walk):
    """A walk on which every loaded partition is compared with its module, both fed the same inputs.

    Args:
        bundle: Loaded from disk.
        modules: The modules by name, on the CPU in eval mode.
        route: The bundle's, at any width of codes.
        placement: Whose partitions run.
        batch: Number of samples, for messages.
    """

    def __init__(
        self, bundle: Bundle, modules: Mapping[str, nn.Module], route: Route, placement: str, batch: int
    ) -> None:
        super().__init__(route, placement)
        self.bundle, self.modules, self.batch, self.parity = bundle, modules, batch, Parity()

    def run(self, name: str, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the module and the loaded partition; go on with what the latter returns."""
        where, codec = self._where(name), self.route.behind(name)
        partition, module = self.bundle.partitions[name], self.modules[name]
        expected = run_module(module, arguments, [item.name for item in partition.spec.outputs], name)
        try:
            actual = partition(arguments)
        except (RuntimeError, BundleError) as error:
            raise ParityError(f"{where} does not run once it is traced: {error}") from error
        self.parity |= compare(expected, actual, where)
        _check_alone(module, arguments, expected, codec, name)
        return actual

    def send(self, crossing: Crossing, tensors: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        """Return what arrives of a tensor's bytes."""
        return through_bytes(crossing.codec, tensors, self._where(crossing.producer))

    def receive(self, crossing: Crossing, payload: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return what arrived."""
        return payload

    def _where(self, name: str) -> str:
        codec = self.route.behind(name)
        return f"partition {name} with a batch of {self.batch}" + (f" at {codec.bits} bits" if codec else "")


def parity_gate(bundle: Bundle, modules: Mapping[str, nn.Module], batch: Tensor) -> dict[str, Any]:
    """Compare every loaded partition with its module, both fed the same inputs.

    Run with the whole batch, with one sample, with one mirrored sample, and at the least number of bits where codes are
    sent. What a part sends passes through its codec, and the next part takes what arrived; nobody leaves early.

    Args:
        bundle: Loaded from disk.
        modules: The modules by name, on the CPU in eval mode.
        batch: The network's input for at least 2 samples.

    Returns:
        What was measured, for the manifest: ``max_difference``, ``codes_differing`` and ``batches``.

    Raises:
        ParityError: A partition differs by more than 1e-5 + 1e-5·|y|, or in more than 1e-4 of its codes, or in any by
            more than one step; it fails at another batch size; or a sample's outputs depend on its neighbours.
    """
    manifest = bundle.manifest
    route, parity = manifest.route, Parity()
    mirrored = manifest.input.mirrored(batch)[-1:]
    runs = [(route, batch), (route, batch[:1]), (route, mirrored)]
    if coarse := {name: codec.with_bits(MIN_BITS) for name, codec in route.codecs.items() if codec.levels}:
        runs.append((route.with_codecs(coarse), batch))
    for each, inputs in runs:
        gates = {place: Gate(bundle, modules, each, place, len(inputs)) for place in each.placements}
        walk_all(gates, each, inputs)
        for gate in gates.values():
            parity |= gate.parity
    return {
        "max_difference": parity.max_difference,
        "codes_differing": parity.codes_differing,
        "batches": [len(batch), 1],
    }


def first_sample(arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a partition's arguments to a batch of one; scalars, such as the number of levels, have no batch."""
    return {name: tensor[:1] if tensor.ndim else tensor for name, tensor in arguments.items()}


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
