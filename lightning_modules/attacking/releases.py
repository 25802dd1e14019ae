"""What leaves a device, as an adversary behind the bytes has it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cleave.architectures import StagedNetwork, UniformQuantizer
from cleave.architectures.naming import did_you_mean
from cleave.deployment import ENVELOPE_BYTES, Bundle, Codec, ImageInput, Message, Pipeline, Side
from cleave.deployment.runtime.each import decode_each
from cleave.lightning_modules.testing import Bytes
from cleave.losses import InformationBottleneckLoss

BATCH = 256


class Releases(abc.ABC):
    """The deployed path of a split network: uint8 images in, decoded payloads out.

    Attributes:
        at: The name of what is sent.
        sends: Names of all that leaves the device.
    """

    at: str
    sends: tuple[str, ...]

    def __call__(self, images: Tensor, times: int = 1) -> Tensor:
        """Return what the adversary has of uint8 images (N, C, H, W): the mean of several releases of each, float32."""
        return _batched(lambda some: torch.stack([self.release(some) for _ in range(times)]).mean(0), images)

    def answers(self, images: Tensor) -> Tensor:
        """Return what the network answers on images, (N, ...), through the same bytes."""
        return _batched(self.answer, images)

    def draws(self, images: Tensor) -> bool:
        """Whether two releases of one image differ."""
        some = images[:8]
        return not torch.equal(self(some), self(some))

    @abc.abstractmethod
    def release(self, images: Tensor) -> Tensor:
        """Return what one release of a batch of images is decoded to."""

    def payload_bytes(self, images: Tensor) -> list[int]:
        """Return the length of what is sent of each image at :attr:`at`, in bytes, its envelope left out."""
        return [length for some in images.split(BATCH) for length in self.lengths(some)]

    @abc.abstractmethod
    def answer(self, images: Tensor) -> Tensor:
        """Return what the network answers on a batch of images."""

    @abc.abstractmethod
    def lengths(self, images: Tensor) -> list[int]:
        """Return the length of each payload of a batch of images, in bytes, its envelope left out."""


class NetworkReleases(Releases):
    """The path of a network, through real bytes.

    Args:
        network: The network, in eval mode.
        image_input: What it takes.
        at: The cut whose payload is attacked; ``None``: the first.
        noise: ``False`` leaves out what the device lays over the representation, and takes the mean of a drawn one.

    Raises:
        ValueError: The network sends nothing, or nothing there.
    """

    def __init__(
        self, network: StagedNetwork, image_input: ImageInput, at: str | None = None, noise: bool = True
    ) -> None:
        self.sends = tuple(network.bottlenecks)
        if not self.sends:
            raise ValueError(
                "the network is not split: it sends no payload to attack; train one with split.at=LAYER, and attack a "
                "path through two networks by its bundle"
            )
        self.at = chosen(at, self.sends)
        self.network, self.image_input, self.noise = network, image_input, noise
        self.bottleneck = network.bottlenecks[self.at]

    @torch.no_grad()
    def release(self, images: Tensor) -> Tensor:
        """Return what is decoded behind the bytes."""
        inputs = self.image_input.normalize(images)
        if self.noise:
            name = f"{self.at}/sent"
            return self.network.outputs(inputs, [name], link=Bytes())[name]
        name = f"{self.at}/{'mean' if self.bottleneck.sampled else 'z'}"
        z = self.network.outputs(inputs, [name], link=Bytes())[name]
        return self.bottleneck.deliver(z, Bytes())

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """Return the last classifier's answer."""
        result = self.network.results[0]
        return self.network.outputs(self.image_input.normalize(images), [result], link=Bytes())[result]

    def lengths(self, images: Tensor) -> list[int]:
        """Return the length of each payload."""
        return [len(payload) for payload in self._sent(images).payloads[self.at]]

    def rate(self, images: Tensor) -> Tensor | None:
        """Return the bits that the learned prior predicts for each image's codes; ``None`` where there is no prior."""
        if not self.bottleneck.has_prior:
            return None
        estimated: Callable[[Tensor], Tensor] = self.bottleneck.quantizer.estimated_bits  # type: ignore[assignment]
        with torch.no_grad():
            codes = (self._sent(some).sent[self.at]["codes"] for some in images.split(BATCH))
            return torch.cat([estimated(some) for some in codes])

    @torch.no_grad()
    def divergence(self, images: Tensor) -> Tensor | None:
        """Return each image's KL of the encoder's Gaussian to a standard normal, in nats; ``None`` without one."""
        if not self.bottleneck.stochastic:
            return None
        names, loss = [f"{self.at}/mean", f"{self.at}/log_variance"], InformationBottleneckLoss()
        found = []
        for some in images.split(BATCH):
            outputs = self.network.outputs(self.image_input.normalize(some), names)
            mean, log_variance = (outputs[name] for name in names)
            found += [loss(mean[[i]], log_variance[[i]]) for i in range(len(mean))]
        return torch.stack(found)

    @torch.no_grad()
    def _sent(self, images: Tensor) -> Bytes:
        link = Bytes()
        self.network.outputs(self.image_input.normalize(images), [f"{self.at}/sent"], link=link)
        return link


class BundleReleases(Releases):
    """The path of a bundle: the device's side runs, and what leaves it is decoded as the other side does.

    Every image is sent: where a policy would let some leave on the device, it is set aside.

    Args:
        bundle: A bundle with all its placements.
        at: The tensor whose payload is attacked; ``None``: the first that leaves the device.

    Raises:
        ValueError: The bundle takes no images, nothing leaves its device, or nothing of that name.
    """

    def __init__(self, bundle: Bundle, at: str | None = None) -> None:
        if not isinstance(bundle.input, ImageInput):
            raise ValueError(f"this bundle takes {bundle.input.name}, no images, so no images can be rebuilt from it")
        bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, policy=None))
        route = bundle.manifest.route
        leaving = {crossing.tensor: crossing for crossing in route.crossings if crossing.source == route.entry}
        self.sends = tuple(leaving)
        if not self.sends:
            raise ValueError("the bundle's network is not split: nothing leaves its device that could be attacked")
        self.at = chosen(at, self.sends)
        self.crossing = leaving[self.at]
        self.pipeline = Pipeline(bundle)
        self.device: Side = self.pipeline.sides[route.entry]
        self.server: Side = self.pipeline.sides[self.crossing.target]

    def release(self, images: Tensor) -> Tensor:
        """Return what is decoded behind the bytes."""
        sent = self._sent(images)
        envelope = self.server.envelopes.get((self.at, self.crossing.target))
        tensors, errors = decode_each(self.crossing.codec, envelope, sent.payloads[self.at], sent.rows)
        for error in errors.values():
            raise error
        return dequantised(self.crossing.codec, tensors).to(images.device)

    def answer(self, images: Tensor) -> Tensor:
        """Return the first of the bundle's answers."""
        outputs = self.pipeline.run(images.cpu()).outputs
        return next(iter(outputs.values())).float().clone().to(images.device)

    def lengths(self, images: Tensor) -> list[int]:
        """Return the length of each payload."""
        around = ENVELOPE_BYTES if (self.at, self.crossing.target) in self.device.envelopes else 0
        return [len(payload) - around for payload in self._sent(images).payloads[self.at]]

    def _sent(self, images: Tensor) -> Message:
        request = object()
        with torch.inference_mode():
            sent = self.device.run(images.cpu(), request).messages[self.crossing.target]
        self.device.forget(request)
        return sent


def dequantised(codec: Codec, tensors: dict[str, Tensor]) -> Tensor:
    """Return what a codec delivers as numbers (B, ...): codes over their range, or the tensor that it is."""
    if set(codec.delivers) == {"codes", "low", "high", "levels"}:
        return UniformQuantizer.decode(tensors["codes"], tensors["low"], tensors["high"], tensors["levels"]).clone()
    return tensors[codec.delivers[0]].float().clone()


def chosen(at: str | None, sends: tuple[str, ...]) -> str:
    """Return which of all that is sent is attacked; ValueError where it is not among them."""
    if at is None:
        return sends[0]
    if at not in sends:
        raise ValueError(f"at={at!r} is not sent by the device; it sends {', '.join(sends)}.{did_you_mean(at, sends)}")
    return at


def _batched(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(some) for some in images.split(BATCH)]).float()
