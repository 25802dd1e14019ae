"""What a backbone computes on a sample, and the proof that what was made of it computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cleave.architectures.cutting.draws import own_generators, random_state
from cleave.architectures.cutting.refusals import WAY_OUT, CutError, first_line

# How far gradients may lie apart, in units of the largest of a tensor: some kernels sum in an order of their own.
ROUNDING = 1e-4


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
        result: What was returned.
        buffers: The backbone's buffers afterwards.
        draws: The states of the random generators afterwards.
        gradients: Those of the input and of the parameters; ``None`` in eval mode, and where backward fails.
    """

    result: Any
    buffers: list[Tensor]
    draws: tuple[Any, ...]
    gradients: list[Tensor | None] | None


class Reference:
    """What a backbone returns on a sample in eval and in training mode, and what it leaves in its buffers.

    In training mode its gradients belong to it.

    Args:
        backbone: The uncut network.
        sample: Batch that its forward takes.
        rewind: Resets buffers and generators, see :func:`cleave.architectures.cutting.tracing.preserved`.

    Raises:
        CutError: The backbone does not run on the sample.
    """

    def __init__(self, backbone: nn.Module, sample: Tensor, rewind: Callable[[], None]) -> None:
        if not isinstance(sample, Tensor) or sample.ndim < 2 or not len(sample):
            got = f"shape {tuple(sample.shape)}" if isinstance(sample, Tensor) else type(sample).__name__
            raise CutError(f"sample is a batch, one tensor (B, …) with B at least 1; got {got}.")
        self.backbone = backbone
        self.rewind = rewind
        # A training step costs thrice a forward, so it takes a single sample, unless a BatchNorm refuses to train on
        # one value per channel.
        one, self.pair = sample[:1], sample if len(sample) > 1 else torch.cat([sample, sample.flip(-1)])
        self.samples = {False: one, True: one}
        self.expected: dict[bool, Outcome] = {False: self._first(False)}
        try:
            self.expected[True] = self.run(backbone, backbone, training=True)
        except Exception:
            self.samples[True] = self.pair
            self.expected[True] = self._first(True)
        # Two batch sizes tell sizes of inputs from those of batches.
        alone = len(self.samples[True]) == 1
        self.batch = {True: len(self.samples[True]), False: len(self.pair) if alone else 1}

    def _first(self, training: bool) -> Outcome:
        try:
            return self.run(self.backbone, self.backbone, training)
        except Exception as error:
            mode = "training" if training else "eval"
            raise CutError(
                f"{type(self.backbone).__name__} itself does not run in {mode} mode on a sample of shape "
                f"{tuple(self.samples[training].shape)}: {first_line(error)}"
            ) from error

    def run(self, network: nn.Module, forward: Callable[[Tensor], Any], training: bool, learn: bool = True) -> Outcome:
        """Run a forward in one mode from the same state, and in training mode a backward behind it, if asked to."""
        self._start(network, training)
        sample, gradients = self.samples[training].clone(), None
        if not training:
            result = forward(sample)
        else:
            # Without gradients some kernels sum in another order.
            with learning(self.backbone) as parameters, torch.enable_grad():
                leaf = sample.requires_grad_(sample.is_floating_point())
                result = forward(leaf.clone())
                gradients = gradients_of(result, [leaf, *parameters]) if learn else None
                result = tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, result)
        outcome = Outcome(
            result,
            [buffer.clone() for buffer in self.backbone.buffers()],
            random_state(own_generators(self.backbone)),
            gradients,
        )
        self.rewind()
        return outcome

    def observe(self, forward: Callable[[Tensor], Any], training: bool) -> None:
        """Run a forward of the backbone in one mode on ``batch[training]`` samples, for what can be seen in it."""
        self._start(self.backbone, training)
        forward(self.pair[: self.batch[training]].clone())
        self.rewind()

    def _start(self, network: nn.Module, training: bool) -> None:
        self.rewind()
        for module in (*self.backbone.modules(), *network.modules()):
            module.training = training

    def check(
        self,
        network: nn.Module,
        forward: Callable[[Tensor], Any],
        training: bool,
        opened: Sequence[str] = (),
        *,
        learn: bool = True,
    ) -> None:
        """Compare a forward with the backbone's in one mode.

        Args:
            network: What is run.
            forward: Its forward.
            training: The mode.
            opened: Names of the modules whose forward was recorded.
            learn: Whether to run a backward in training mode and compare gradients, and buffers, which checkpointed
                layers alter once more in it.

        Raises:
            CutError: Results or buffers differ in any bit, gradients by more than rounding, or other numbers are drawn.
        """
        actual, expected = self.run(network, forward, training, learn), self.expected[training]
        differs = None
        try:
            compared = slice(2 if learn else 1)
            torch.testing.assert_close(actual[compared], expected[compared], rtol=0, atol=0, equal_nan=True)
        except AssertionError as error:
            differs = str(error).splitlines()[0]
        if differs is None and learn and not _close(actual.gradients, expected.gradients):
            differs = "Gradients are not equal"
        if differs is None and actual.draws != expected.draws:
            differs = "Random draws are not equal"
        if differs is not None:
            mode = "training" if training else "eval"
            names = [repr(name) for name in opened if name]
            where = f"the forward of {', '.join(names[:3])}" if names else "its forward"
            raise CutError(
                f"the traced parts do not reproduce {type(self.backbone).__name__} in {mode} mode: "
                f"{differs.rstrip('.!')}. Something in {where} cannot be recorded. {WAY_OUT}"
            )


@contextmanager
def learning(backbone: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let every parameter learn for a while, frozen ones too, as they may be trained later; yield them."""
    parameters = [each for each in backbone.parameters() if each.is_floating_point()]
    before = [(each, each.requires_grad, each.grad) for each in parameters]
    for each in parameters:
        each.requires_grad_(True)
    try:
        yield parameters
    finally:
        for each, learns, gradient in before:
            each.grad = gradient
            each.requires_grad_(learns)


def gradients_of(result: Any, inputs: Sequence[Tensor]) -> list[Tensor | None] | None:
    """Return the gradients of a fixed weighted sum of a result; ``None`` where torch has none."""
    tensors = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.requires_grad]
    inputs = [each for each in inputs if each.requires_grad]
    if not tensors:
        return [None] * len(inputs)
    weights = [torch.linspace(-1, 1, each.numel(), dtype=each.dtype, device=each.device) for each in tensors]
    weights = [weight.view(each.shape) for weight, each in zip(weights, tensors, strict=True)]
    try:
        return list(torch.autograd.grad(tensors, inputs, weights, allow_unused=True, retain_graph=True))
    except RuntimeError as error:
        if ".grad()" not in str(error):
            return None
    for each in inputs:
        each.grad = None
    torch.autograd.backward(tensors, weights)  # reentrant checkpoints know this form alone
    return [each.grad for each in inputs]


def _close(actual: list[Tensor | None] | None, expected: list[Tensor | None] | None) -> bool:
    if actual is None or expected is None:
        return expected is None
    for one, other in zip(actual, expected, strict=True):
        one, other = (None if each is None or not each.any() else each for each in (one, other))
        if one is None or other is None:
            if one is not other:
                return False
        elif not torch.equal(one, other):
            torch.nan_to_num_(one), torch.nan_to_num_(other)
            if (one - other).abs().max() > ROUNDING * other.abs().max():
                return False
    return True
