"""A backbone with a bottleneck injected at a cut: the network that is trained to be split."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cleave.architectures.cutting.stages import LOGITS, CutError, Stages, cut
from cleave.architectures.inserts.bottleneck import FORMS, VECTOR_LAYOUTS, build_bottleneck
from cleave.architectures.inserts.calibration import calibrate_range
from cleave.architectures.inserts.channels import build_channel
from cleave.architectures.inserts.entropy_bottleneck import EntropyBottleneck
from cleave.architectures.inserts.gaussian import GaussianEncoder, make_gaussian
from cleave.architectures.inserts.quantizer import Quantizer, UniformQuantizer, build_quantizer
from cleave.architectures.inserts.switchable import select, switchable
from cleave.architectures.macs import count_macs, count_params
from cleave.architectures.modes import evaluating
from cleave.architectures.naming import did_you_mean
from cleave.deployment import FLOAT_BITS, Codec, check_bits

HEAD = "head"
LIKELIHOODS = "likelihoods"
MEAN, LOG_VARIANCE = "mean", "log_variance"
PARTS = ("head", "encoder", "quantizer", "decoder", "tail")


class SplitNetwork(nn.Module):
    """A backbone split at ``at``: [head →] encoder → quantiser [→ channel] → decoder → tail.

    In the form ``replace`` the bottleneck takes the place of everything before the cut, as in head-network
    distillation; in ``insert`` the head stays and an autoencoder stands behind it, as in reconstruction training and as
    token features need it; in ``none`` there is no bottleneck and the feature itself is quantised and sent. The
    network is cut from a deep copy, so that freezing a part never freezes the backbone (or the teacher) it came from.

    Args:
        backbone: Network that maps normalised images (B, C, H, W) to logits (B, classes).
        at: Name of the layer to split at, as ``cut_points`` lists it.
        sample: Normalised images (B, C, H, W) of the size the network will see; one is enough.
        form: ``replace``, ``insert`` or ``none``.
        bottleneck: Keyword arguments of ``build_bottleneck`` (``channels``, ``stride``,
            ``kernel``, ``width``, ``depth``), and ``variance``: ``learned`` or a number makes the encoder stochastic
            (:func:`~cleave.architectures.inserts.gaussian.make_gaussian`). ``None`` with the form ``none``.
        codec: What turns the representation into bytes. ``kind`` ``uniform`` (default): ``bits`` (2 to 16, or 32 for
            float), ``range`` and ``momentum`` of ``UniformQuantizer``, ``coding`` and
            ``quality`` of :func:`cleave.deployment.code_codec`, and ``widths``, several bits to train one network for.
            ``kind`` ``entropy``: a learned prior, :class:`~cleave.architectures.EntropyBottleneck`.
        channel: Settings of ``build_channel``: what the link does to the representation.
        observe: Further layers of the tail that :meth:`features` can return.

    Attributes:
        head: Backbone stage before the split, ``None`` in the form ``replace``.
        encoder, quantizer, decoder: The bottleneck.
        channel: The link between quantiser and decoder, ``None`` where it is perfect.
        tail: Stages after the split, one more than ``observe`` has names.
        shape: Per-sample shape of the representation.
        widths: Widths in bits that one network is trained for; empty where it knows one.

    Raises:
        CutError: A layer is unknown, is crossed by several tensors, or the names are out of order.
        ValueError: A bottleneck, codec or channel argument is out of range.
    """

    head: nn.Module | None
    encoder: nn.Module
    quantizer: Quantizer
    decoder: nn.Module
    tail: Any

    def __init__(
        self,
        backbone: nn.Module,
        at: str,
        sample: Tensor,
        *,
        form: str = "replace",
        bottleneck: Mapping[str, Any] | None = None,
        codec: Mapping[str, Any] | None = None,
        channel: Mapping[str, Any] | None = None,
        observe: Sequence[str] = (),
    ) -> None:
        super().__init__()
        observe = [name for name in observe if name != at]
        if taken := [name for name in (at, *observe) if name in (HEAD, LOGITS, LIKELIHOODS, MEAN, LOG_VARIANCE)]:
            raise ValueError(f"{taken[0]!r} names an output of every split network; cut at a layer of another name")
        stages, feature = _cut(backbone, at, observe, sample, form)
        self.split = at
        self.names = (at, *observe)
        self.image_shape, self.feature_shape = tuple(sample.shape[1:]), tuple(feature.shape[1:])
        self.head = None if form == "replace" else stages[0]
        settings = dict(bottleneck or {})
        variance = settings.pop("variance", None)
        if form == "none":
            if bottleneck is not None:
                raise ValueError("split.form=none sends the feature itself: add bottleneck=null")
            self.encoder, self.decoder, self.shape = nn.Identity(), nn.Identity(), self.feature_shape
        else:
            built = build_bottleneck(self.image_shape, self.feature_shape, stages.layouts[0], form=form, **settings)
            self.encoder, self.decoder, self.shape = built
        if variance is not None:
            self.encoder = make_gaussian(self.encoder, variance)
        coding = dict(codec or {})
        ours = () if coding.get("kind") == "entropy" else ("coding", "quality", "widths")
        self.coding = {key: value for key in ours if (value := coding.pop(key, None)) is not None}
        self.widths = tuple(sorted(self.coding.pop("widths", ())))
        self.quantizer = build_quantizer(coding, self.shape, axis=-1 if stages.layouts[0] in VECTOR_LAYOUTS else 0)
        self.codec  # noqa: B018 what cannot be coded is refused here
        self.tail = nn.Sequential(*(stages[i] for i in range(1, len(stages))))
        self._make_switchable()
        self.set_channel(channel)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, classes)."""
        return self.tail(self.decode(self.encode(images)))

    def encode(self, images: Tensor) -> Tensor:
        """Map normalised images to the representation before quantisation, (B, *shape)."""
        return self.encoder(images if self.head is None else self.head(images))

    def decode(self, z: Tensor) -> Tensor:
        """Quantise and de-quantise a representation and map it to the feature at the split, in the cut's layout."""
        return self._arrived(self.quantizer(z), z.dtype)

    def features(self, images: Tensor | None, at: Iterable[str], head: Tensor | None = None) -> dict[str, Tensor]:
        """Return features by name, running no further than the last one asked for.

        Args:
            images: Normalised images (B, C, H, W); ``None`` where ``head`` is given.
            at: Names: the split, an observed layer, ``logits``; and of the bottleneck ``head``, the backbone's feature
                before the encoder, ``likelihoods`` of the learned prior, ``mean`` and ``log_variance`` of the
                stochastic encoder.
            head: The head's output, where it is already known: a frozen head's may have been stored.

        Raises:
            CutError: This network has no such feature.
        """
        wanted = list(at)
        self.check_names(wanted)
        found: dict[str, Tensor] = {}
        x: Any = images
        if self.head is not None:
            x = found[HEAD] = self.head(images) if head is None else head
        z = self._sampled(x, found)
        if any(name in wanted for name in (*self.names, LOGITS, LIKELIHOODS)):
            z_hat = self.quantizer(z)
            if LIKELIHOODS in wanted:
                found[LIKELIHOODS] = cast(EntropyBottleneck, self.quantizer).likelihoods(z_hat)
            found |= self._run_tail(z_hat, z.dtype, wanted)
        return {name: found[name] for name in wanted}

    def _sampled(self, x: Tensor, found: dict[str, Tensor]) -> Tensor:
        if not isinstance(self.encoder, GaussianEncoder):
            return self.encoder(x)
        mean, log_variance = self.encoder.distribution(x)
        found |= {MEAN: mean, LOG_VARIANCE: log_variance}
        return self.encoder.sample(mean, log_variance) if self.encoder.training else mean

    def _run_tail(self, z_hat: Tensor, dtype: torch.dtype, wanted: Sequence[str]) -> dict[str, Tensor]:
        order = (*self.names, LOGITS)
        last = max((order.index(name) for name in wanted if name in order), default=-1)
        found: dict[str, Tensor] = {}
        if last < 0:
            return found
        x = self._arrived(z_hat, dtype)
        for i, name in enumerate(order):
            if name in wanted:
                # A tail may begin with an in-place layer, which must not reach what the caller holds.
                found[name] = x.clone() if i < last else x
            if i == last:
                break
            x = self.tail[i](x)
        return found

    def _arrived(self, z_hat: Tensor, dtype: torch.dtype) -> Tensor:
        """Send a de-quantised representation over the channel and decode what arrives, in the network's dtype."""
        if self.channel is not None:  # before the cast: half precision no longer tells fine codes apart
            z_hat = self.channel(z_hat, self.quantizer)
        if self.widths:
            self._select(cast(int, self.bits))
        return self.decoder(z_hat.to(dtype))

    @property
    def available(self) -> tuple[str, ...]:
        """Every name that :meth:`features` knows."""
        names: tuple[str, ...] = (*self.names, LOGITS)
        if self.head is not None:
            names += (HEAD,)
        if isinstance(self.encoder, GaussianEncoder):
            names += (MEAN, LOG_VARIANCE)
        if isinstance(self.quantizer, EntropyBottleneck):
            names += (LIKELIHOODS,)
        return names

    def check_names(self, names: Iterable[str]) -> None:
        """Raise CutError unless :meth:`features` knows every name; worth a call before training."""
        for name in names:
            if name in self.available:
                continue
            hints = {
                LIKELIHOODS: " A learned prior gives them: codec=entropy.",
                MEAN: " A stochastic encoder gives it: bottleneck.variance=learned.",
                LOG_VARIANCE: " A stochastic encoder gives it: bottleneck.variance=learned.",
                HEAD: " split.form=insert keeps the head.",
            }
            raise CutError(
                f"this split network has no feature {name!r}; it has {', '.join(self.available)}."
                + hints.get(name, did_you_mean(name, self.available) + " split.observe adds layers.")
            )

    # --- bytes ------------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec:
        """How a representation becomes bytes: the deployment codec with the present bits, range or prior."""
        return self.quantizer.codec(self.shape, **self.coding)

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the device sends for normalised images, as the tensors that ``codec.encode`` takes."""
        return self.send(self.encode(images), self.codec)

    def send(self, z: Tensor, codec: Codec) -> dict[str, Tensor]:
        """Return what the device sends of a representation (B, *shape) by a codec of this network's."""
        settings = (value.to(z.device) for value in codec.settings.values())
        sent = self.quantizer.send(z, *settings)
        return dict(zip(codec.sends, sent if isinstance(sent, tuple) else (sent,), strict=True))

    def receive(self, received: Mapping[str, Tensor]) -> Tensor:
        """Map what ``codec.decode`` delivers to logits (B, classes), over the channel where one is active."""
        weight = next(self.tail.parameters())
        tensors = [tensor.to(weight.device) for tensor in received.values()]
        return self.tail(self._arrived(self.quantizer.receive(*tensors), weight.dtype))

    @property
    def bits(self) -> int | None:
        """Width of a code at present; 32 where the representation is not quantised, ``None`` under a learned prior."""
        return self.quantizer.bits

    def set_bits(self, bits: int) -> None:
        """Change the width of the codes after training; 32 leaves the quantiser out.

        The decoder's BatchNorm statistics are those of the old width, unless the network was trained for several
        widths: see :func:`~cleave.architectures.inserts.recalibrate.recalibrate_batchnorm`.

        Raises:
            ValueError: ``bits`` is out of range, the network was built without a quantiser, which has no range, its
                prior knows no widths, or ``bits`` is 32 and the network was trained for several widths.
        """
        if self.widths and check_bits(bits) == FLOAT_BITS:
            raise ValueError(
                f"codec.bits={bits}: this network was trained for codec.widths={list(self.widths)} and has no "
                "BatchNorm for float; choose 2 to 16"
            )
        self.quantizer = self.quantizer.with_bits(bits)

    def calibrate(self, batches: Iterable[Tensor], bits: int, method: str = "mse") -> tuple[float, float]:
        """Give a network trained in float codes of some width, their range chosen on batches of normalised images.

        Args:
            batches: Normalised images (B, C, H, W) each.
            bits: Width of the codes, 2 to 16.
            method: As of :func:`~cleave.architectures.inserts.calibration.calibrate_range`.

        Returns:
            The range (low, high).
        """
        with evaluating(self), torch.no_grad():
            low, high = calibrate_range((self.encode(images) for images in batches), bits, method)
            device = next(self.tail.parameters()).device
        self.quantizer = UniformQuantizer(bits).to(device).train(self.training)
        self.quantizer.set_range(low, high)
        if self.channel is not None:
            self.channel.check(self.quantizer)
        return low, high

    def set_channel(self, settings: Mapping[str, Any] | None) -> None:
        """Put another link between the parts, or none.

        Raises:
            ValueError: The settings are wrong, or the link cannot carry what the quantiser makes.
        """
        self.channel = build_channel(settings)
        if self.channel is not None:
            self.channel.check(self.quantizer)

    def _make_switchable(self) -> None:
        if not self.widths:
            return
        if not isinstance(self.quantizer, UniformQuantizer) or self.bits not in self.widths:
            raise ValueError(
                f"codec.bits={self.bits} must be one of codec.widths={list(self.widths)}: it is the one validated"
            )
        self.decoder, self.tail = switchable(self.decoder, self.widths), switchable(self.tail, self.widths)

    def _select(self, width: int | Tensor) -> None:
        """Choose the BatchNorm of a width, in bits or as a tensor of levels."""
        select(self.decoder, width)
        select(self.tail, width)

    # --- costs ------------------------------------------------------------------------------------------------------

    def bottleneck_parameters(self) -> list[nn.Parameter]:
        """Parameters of encoder, quantiser and decoder: what head-network distillation trains."""
        return [p for part in (self.encoder, self.quantizer, self.decoder) for p in part.parameters()]

    def device_encoder(self) -> nn.Module:
        """The encoder as a device runs it: the mean alone where it is stochastic in training."""
        return self.encoder.deterministic() if isinstance(self.encoder, GaussianEncoder) else self.encoder

    @torch.no_grad()
    def profile(self) -> dict[str, dict[str, int]]:
        """MACs per image and parameters of each part: ``{"encoder": {"macs": …, "params": …}, …}``."""
        weight = next(self.tail.parameters())
        x = torch.zeros(1, *self.image_shape, device=weight.device, dtype=weight.dtype)
        costs = {}
        parts = {"head": self.head, "encoder": self.device_encoder(), "decoder": self.decoder, "tail": self.tail}
        with evaluating(self):
            for name, part in parts.items():
                if part is None:
                    continue
                costs[name] = {"macs": count_macs(part, x), "params": count_params(part)}
                x = part(x)
        return costs

    def sizes(self) -> dict[str, int]:
        """Bytes per sample against which a payload is judged: the uint8 input and the float32 feature at the cut."""
        return {"input": math.prod(self.image_shape), "feature": 4 * math.prod(self.feature_shape)}


def _cut(backbone: nn.Module, at: str, observe: Sequence[str], sample: Tensor, form: str) -> tuple[Stages, Tensor]:
    """Cut a copy of the backbone and return it with its feature at the split."""
    if form not in (*FORMS, "none"):
        raise ValueError(f"split.form must be one of {', '.join(FORMS)} or none, got {form!r}")
    try:
        stages = cut(copy.deepcopy(backbone), at=[at, *observe], sample=sample)
    except CutError as error:
        if "out of order" in str(error):
            raise CutError(
                f"{error} The layers compared ({', '.join(observe)}) must stand behind the split at {at!r}: those "
                "before it run on the device, where the student's differ from the teacher's"
            ) from error
        raise
    with torch.no_grad():
        feature = stages.eval().features(sample[:1], at=[at])[at]
    stages.train()
    return stages, feature
