"""A backbone with a bottleneck injected at a cut: the network that is trained to be split."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from architectures.bottleneck import build_bottleneck
from architectures.macs import count_macs, count_params
from architectures.naming import did_you_mean
from architectures.quantizer import UniformQuantizer
from architectures.stages import CutError, cut
from deployment import FloatCodec, UniformCodec, check_bits

Codec = FloatCodec | UniformCodec


class SplitNetwork(nn.Module):
    """A backbone split at ``at``: [head →] encoder → quantiser → decoder → tail.

    In the form ``replace`` the bottleneck takes the place of everything before the cut, as in head-network
    distillation; in ``insert`` the head stays and an autoencoder stands behind it, as in reconstruction training and as
    token features need it. The network is cut from a deep copy, so that freezing a part never freezes the backbone (or
    the teacher) it came from.

    Args:
        backbone: Network that maps normalised images (B, C, H, W) to logits (B, classes).
        at: Name of the layer to split at, as ``cut_points`` lists it.
        sample: Normalised images (B, C, H, W) of the size the network will see; one is enough.
        form: ``replace`` or ``insert``.
        bottleneck: Keyword arguments of :func:`~architectures.bottleneck.build_bottleneck`: ``channels``, ``stride``,
            ``kernel``, ``width``, ``depth``.
        codec: ``bits`` (2 to 16, or 32 for float) and, of :class:`~architectures.quantizer.UniformQuantizer`,
            ``range`` and ``momentum``.
        observe: Further layers of the tail that :meth:`features` can return.

    Attributes:
        head: Backbone stage before the split in the form ``insert``, else ``None``.
        encoder, quantizer, decoder: The bottleneck; ``quantizer`` is ``None`` for 32 bits.
        tail: Stages after the split, one more than ``observe`` has names.
        shape: Per-sample shape of the representation.

    Raises:
        CutError: A layer is unknown, is crossed by several tensors, or the names are out of order.
        ValueError: A bottleneck or codec argument is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        at: str,
        sample: Tensor,
        *,
        form: str = "replace",
        bottleneck: Mapping[str, Any] | None = None,
        codec: Mapping[str, Any] | None = None,
        observe: Sequence[str] = (),
    ) -> None:
        super().__init__()
        settings = dict(codec or {})
        bits = settings.pop("bits", 8)
        check_bits(bits)
        quantizer = UniformQuantizer(8 if bits == 32 else bits, **settings)  # its settings are checked at 32 bits too
        stages = cut(copy.deepcopy(backbone), at=[at, *observe], sample=sample)
        with torch.no_grad():
            feature = stages.eval().features(sample[:1], at=[at])[at]
        stages.train()
        layout = stages.layouts[0]
        image, target = tuple(sample.shape[1:]), tuple(feature.shape[1:])
        inserted = form == "insert"
        built = build_bottleneck(image, target, layout, form=form, **(bottleneck or {}))
        self.split = at
        self.names = (at, *observe)
        self.shape = built.shape
        self.image_shape, self.feature_shape = image, target
        self.head = stages[0] if inserted else None
        self.encoder = built.encoder
        self.quantizer = None if bits == 32 else quantizer
        self.decoder = built.decoder
        self.tail = nn.Sequential(*(stages[i] for i in range(1, len(stages))))

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, classes)."""
        return self.tail(self.decode(self.encode(images)))

    def encode(self, images: Tensor) -> Tensor:
        """Map normalised images to the representation before quantisation, (B, *shape)."""
        return self.encoder(images if self.head is None else self.head(images))

    def decode(self, z: Tensor) -> Tensor:
        """Quantise and de-quantise a representation and map it to the feature at the split, in the cut's layout."""
        return self.decoder(z if self.quantizer is None else self.quantizer(z).to(z.dtype))

    def features(self, images: Tensor, at: Iterable[str]) -> dict[str, Tensor]:
        """Return the features at the split and at observed layers, running no further than the last one asked for.

        Raises:
            CutError: A name is neither the split nor an observed layer.
        """
        wanted = list(at)
        for name in wanted:
            if name not in self.names:
                raise CutError(
                    f"this split network has no feature {name!r}; it has {', '.join(self.names)}."
                    + did_you_mean(name, self.names)
                )
        last = max(self.names.index(name) for name in wanted)
        found = {}
        x = self.decode(self.encode(images))
        for i, name in enumerate(self.names):
            if name in wanted:
                # A tail may begin with an in-place layer, which must not reach what the caller holds.
                found[name] = x.clone() if i < last else x
            if i == last:
                break
            x = self.tail[i](x)
        return found

    @property
    def codec(self) -> Codec:
        """How a representation becomes bytes: the deployment codec with the present bits and range."""
        if self.quantizer is None:
            return FloatCodec(self.shape)
        fixed = self.quantizer.fixed_range
        low, high = fixed if fixed else (None, None)
        return UniformCodec(self.shape, self.quantizer.bits, low=low, high=high)

    def set_bits(self, bits: int) -> None:
        """Change the width of the codes after training; 32 leaves the quantiser out.

        The decoder's BatchNorm statistics are those of the old width: see
        :func:`~architectures.recalibrate.recalibrate_batchnorm`.

        Raises:
            ValueError: ``bits`` is out of range, or the network was built without a quantiser, which has no range.
        """
        check_bits(bits)
        if bits == 32:
            self.quantizer = None
        elif self.quantizer is None:
            raise ValueError(
                f"codec.bits={bits}: this network was trained with codec.bits=32 and knows no range for codes"
            )
        else:
            self.quantizer.bits = bits

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the device sends for normalised images, as the tensors that ``codec.encode`` takes."""
        z = self.encode(images)
        if self.quantizer is None:
            return {"z": z.float()}
        levels = torch.full((), 2**self.quantizer.bits, dtype=torch.int64, device=z.device)
        return dict(zip(("codes", "low", "high"), self.quantizer.encode(z, levels), strict=True))

    def bottleneck_parameters(self) -> list[nn.Parameter]:
        """Parameters of encoder, quantiser and decoder: what head-network distillation trains."""
        parts = (self.encoder, self.quantizer, self.decoder)
        return [p for part in parts if part is not None for p in part.parameters()]

    @torch.no_grad()
    def profile(self) -> dict[str, dict[str, int]]:
        """MACs per image and parameters of each part: ``{"encoder": {"macs": …, "params": …}, …}``."""
        weight = next(self.encoder.parameters())
        mode = self.training
        self.eval()
        x = torch.zeros(1, *self.image_shape, device=weight.device, dtype=weight.dtype)
        costs = {}
        for name in ("head", "encoder", "decoder", "tail"):
            part = getattr(self, name)
            if part is None:
                continue
            costs[name] = {"macs": count_macs(part, x), "params": count_params(part)}
            x = part(x)
        self.train(mode)
        return costs

    def sizes(self) -> dict[str, int]:
        """Bytes per sample against which a payload is judged: the uint8 input and the float32 feature at the cut."""
        return {"input": math.prod(self.image_shape), "feature": 4 * math.prod(self.feature_shape)}
