"""Adversarial reconstruction: decoders learn to restore the images, and the encoder learns that they cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.losses.privacy.ssim import structural_similarity

Build = Callable[[Sequence[int], Sequence[int]], nn.Module]
MEASURES = ("mse", "ssim")


class AdversarialReconstructionLoss(nn.Module):
    r"""Decoders restore the images from a representation; behind a gradient reversal the encoder works against them.

    After Li, Rakin, Chen, He, Fan and Chakrabarti, "ResSFL: A Resistance Transfer Framework for Defending Model
    Inversion Attack in Split Federated Learning", 2022, eq. 2, with one optimiser for both sides: each decoder D_d
    follows the gradient of its own loss L_d, and the representation z gets

    .. math:: -\lambda \, \partial L_d / \partial z

    of the decoder that restores best (Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", 2015).
    With ``measure="mse"`` L is the mean squared error, so the encoder pays −λ·MSE; with ``"ssim"`` L = 1 − SSIM, and
    with a target the encoder pays λ·max(0, SSIM − target) up to a constant. One decoder is soon outrun by the encoder,
    which then only learns to fool that one: use several, or let them start again now and then.

    Args:
        decoders: What builds each decoder, by name, called with the shapes of a sample of z and of an image (C, H, W);
            it returns a module from (B, *z) to (B, C, H, W).
        strength: λ ≥ 0; at 0 the decoders learn and the encoder does not know of them.
        measure: ``mse`` or ``ssim``.
        target: The encoder pays no more once the mean squared error is above it, or the SSIM below it; ``None``: it
            always pays.
        restarts: How often in a training, at even distances, all decoders start anew, with the training's progress as a
            third argument.
        seed: Of the initial weights of the decoders: they draw nothing from torch's global generator.

    Shape:
        - images: uint8 (B, C, H, W), the ``pixels`` of a batch.
        - representation: (B, ...).
        - progress: a float from 0 to 1, where there are restarts.
        - output: a scalar by decoder, in squared units of an image from 0 to 1, or 1 − SSIM.

    Raises:
        ValueError: An argument is out of its range, a decoder gives no images, the images are no uint8, or the loss was
            never built.

    Example:
        >>> def linear(z, image):
        ...     layer = nn.Linear(torch.Size(z).numel(), torch.Size(image).numel())
        ...     return nn.Sequential(nn.Flatten(), layer, nn.Unflatten(1, tuple(image)))
        >>> loss = AdversarialReconstructionLoss({"linear": linear}, strength=0.5)
        >>> loss.build([(3, 2, 2), (4,)])
        >>> list(loss(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, 4)))
        ['linear']
    """

    restarted: Tensor

    def __init__(
        self,
        decoders: Mapping[str, Build],
        strength: float = 1.0,
        measure: str = "mse",
        target: float | None = None,
        restarts: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not decoders:
            raise ValueError("decoders names none; give at least one, by a name of your own")
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be a finite number of at least 0, got {strength}")
        if measure not in MEASURES:
            raise ValueError(f"measure must be {' or '.join(MEASURES)}, got {measure!r}")
        if target is not None and not 0 <= target <= 1:
            raise ValueError(f"target must lie between 0 and 1, got {target}")
        if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
            raise ValueError(f"restarts must be a whole number of at least 0, got {restarts!r}")
        self.builders = dict(decoders)
        self.strength, self.measure, self.target = strength, measure, target
        self.restarts, self.seed = restarts, seed
        self.decoders = nn.ModuleDict()
        self._shapes: list[tuple[int, ...]] = []
        self.register_buffer("restarted", torch.tensor(0))

    @property
    def follows_progress(self) -> bool:
        """Whether it changes along the training, which must then have an end."""
        return self.restarts > 0

    @property
    def defends(self) -> bool:
        """Whether it teaches the encoder, so that there must be one that learns."""
        return self.strength > 0

    def build(self, shapes: Sequence[Sequence[int]]) -> None:
        """Build the decoders for the shapes of a sample's image and representation, in the order of the arguments.

        Raises:
            ValueError: A decoder does not give images of that shape.
        """
        self._shapes = [tuple(shape) for shape in shapes[:2]]
        image, representation = self._shapes
        self.decoders = nn.ModuleDict(self._fresh(0))
        for name, decoder in self.decoders.items():
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                made = decoder.eval()(torch.zeros(2, *representation))
            decoder.train()
            if tuple(made.shape) != (2, *image):
                raise ValueError(
                    f"the decoder {name!r} makes {tuple(made.shape[1:])} of a sample of {representation}; it must make "
                    f"images of {image}"
                )

    def forward(self, images: Tensor, representation: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """Return the loss of each decoder, by name."""
        if not self.decoders:
            raise ValueError("the decoders are not built yet: call build with the shapes of an image and of z")
        if images.dtype != torch.uint8:
            raise ValueError(
                f"the decoders restore images of uint8, from 0 to 255, got {images.dtype}; read pixels, not images: "
                "of=[pixels, student/LAYER/z]"
            )
        if self.restarts and self.training:
            self._restart(progress)
        targets = images.detach().to(torch.float32) / 255
        scales = {name: torch.zeros((), device=representation.device) for name in self.decoders}
        losses = {}
        for name, decoder in self.decoders.items():
            restored = decoder(_Reversed.apply(representation, scales[name]))
            losses[name] = self._loss(restored.to(torch.float32), targets)
        # Only the decoder that restores best counts for the encoder; read in the backward pass.
        values = torch.stack([loss.detach() for loss in losses.values()])
        best = values.min(0)
        counts = torch.arange(len(values), device=values.device) == best.indices
        for scale, share in zip(scales.values(), self._pays(best.values) * counts, strict=True):
            scale.add_(self.strength * share)
        return losses

    def _loss(self, restored: Tensor, targets: Tensor) -> Tensor:
        if self.measure == "mse":
            return (restored - targets).square().mean()
        return 1 - structural_similarity(restored, targets).mean()

    def _pays(self, loss: Tensor) -> Tensor:
        """Return whether the encoder pays at a loss of the best decoder, as 0 or 1."""
        if self.target is None:
            return torch.ones_like(loss)
        return ((loss < self.target) if self.measure == "mse" else (1 - loss > self.target)).to(loss.dtype)

    def _restart(self, progress: float) -> None:
        due = min(self.restarts, int(progress * (self.restarts + 1)))
        if due == 0 or due <= int(self.restarted):
            return
        self.restarted.fill_(due)
        with torch.no_grad():
            for name, fresh in self._fresh(due).items():
                for own, new in zip(
                    self.decoders[name].state_dict().values(), fresh.state_dict().values(), strict=True
                ):
                    own.copy_(new)

    def _fresh(self, number: int) -> dict[str, nn.Module]:
        """Return decoders with the weights of a start, the same on every rank."""
        image, representation = self._shapes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1000 * number)
            return {name: build(representation, image) for name, build in self.builders.items()}

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"strength={self.strength}, measure={self.measure}, target={self.target}, restarts={self.restarts}"


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round and scaled by what is known only once the losses are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return -ctx.scale.to(gradient.dtype) * gradient, None
