"""The gradients of single samples, by Opacus' formulas for each kind of layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures import StagedNetwork

Gradients = dict[nn.Parameter, Tensor]


class SampleGradients:
    """Watches the layers of a network and finds, in a backward pass, what each sample adds to the gradient.

    The network stays as it is, its names included: nothing is wrapped. Unlike those of Opacus' own module, the hooks
    stand on the tensors that layers return, so that what follows may change these in place.

    Args:
        network: The network.
        weights: Its parameters that learn, whose layers are watched until :meth:`remove`.

    Attributes:
        names: Names of the parameters.
        count: Samples of a pass; at 0 nothing is watched.
        found: Gradients (B, *shape) by parameter, of the passes since :meth:`clear`: of a mean over B samples, those of
            each sample's own loss.
    """

    def __init__(self, network: StagedNetwork, weights: Iterable[nn.Parameter]) -> None:
        self.names = {weight: name for name, weight in network.named_weights()}
        self.found: Gradients = {}
        self.count = 0
        self._layers = list(dict.fromkeys(_layers(network, set(weights))))
        self._handles = [layer.register_forward_hook(self._watch) for layer in self._layers]

    def remove(self) -> None:
        """Leave the network alone again."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            vars(layer).pop("ft_compute_sample_grad", None)  # what Opacus keeps there
        self._handles = []
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleGradients:
        """Stay the same: a copy of a watched layer brings no copy of the network along."""
        return self

    def clear(self, count: int = 0) -> None:
        """Forget what was found; the next passes have ``count`` samples."""
        self.found, self.count = {}, count

    def _watch(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled() or not self.count or not getattr(output, "requires_grad", False):
            return
        given = [each.detach() for each in inputs if isinstance(each, Tensor)]
        output.register_hook(functools.partial(self._found, layer, given))

    def _found(self, layer: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> None:
        if gradient.shape[0] != self.count:
            raise ValueError(
                f"DP-SGD: {self._named(layer)} was run on {gradient.shape[0]} rows for a batch of {self.count} "
                "samples, so that no gradient belongs to one sample; freeze that part, or take another network"
            )
        count, self.count = self.count, 0  # what runs the layer again for a formula is not watched
        try:
            # The loss is a mean over the batch, of which each sample's own is a share.
            found = per_sample(layer, inputs, gradient.detach() * count)
        finally:
            self.count = count
        for parameter, own in found.items():
            if parameter.requires_grad:
                before = self.found.get(parameter)
                self.found[parameter] = own if before is None else before + own

    def _named(self, layer: nn.Module) -> str:
        own = next(weight for weight in layer.parameters() if weight.requires_grad)
        return f"the {type(layer).__name__} of {self.names.get(own, 'the network')}"


def per_sample(layer: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> Gradients:
    """Return each sample's gradient of a layer's parameters.

    Args:
        layer: The layer.
        inputs: What it was run on, (B, ...) first.
        gradient: What came back to its output, (B, ...).

    Raises:
        ValueError: Neither a formula nor ``torch.func`` finds it.
    """
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.functorch import ft_compute_per_sample_gradient

    formula = GradSampleModule.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)
    try:
        with torch.no_grad():
            return formula(layer, list(inputs), gradient)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"DP-SGD finds no gradients of single samples for a {type(layer).__name__}: {str(error).splitlines()[0]}; "
            "freeze that part, or take another layer"
        ) from error


def _layers(module: nn.Module, weights: set[nn.Parameter]) -> Iterator[nn.Module]:
    """Yield the modules that own some of the parameters; one without a formula counts with all that lies in it."""
    from opacus.grad_sample import GradSampleModule

    if any(weight in weights for weight in module.parameters(recurse=False)):
        yield module
        if type(module) not in GradSampleModule.GRAD_SAMPLERS:
            return
    for child in module.children():
        yield from _layers(child, weights)


def clipped_sum(gradients: Gradients, most: float) -> Gradients:
    """Return the sum over samples, the gradient of each over all parameters clipped to a norm.

    Args:
        gradients: (B, *shape) by parameter.
        most: The norm that no sample's gradient exceeds.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> clipped_sum({weight: torch.tensor([[3.0], [0.5]])}, most=1.0)[weight]
        tensor([1.5000])
    """
    if not gradients:
        return {}
    norms = torch.stack([each.reshape(len(each), -1).norm(dim=1) for each in gradients.values()]).norm(dim=0)
    # The norm itself where it is too long: a sample of exactly that norm, or of 0, stays as it is.
    factors = most / norms.clamp_min(most)
    return {weight: torch.einsum("i,i...->...", factors.to(each.dtype), each) for weight, each in gradients.items()}
