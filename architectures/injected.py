"""A bottleneck inserted behind a stage of a larger network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cleave.architectures.inserts.bottleneck import VECTOR_LAYOUTS, build_bottleneck
from cleave.architectures.inserts.quantizer import build_quantizer
from cleave.deployment import Codec


class InjectedBottleneck(nn.Module):
    """encoder → quantiser → decoder around a feature that is sent.

    Args:
        shape: Per-sample shape of the feature, in ``layout``.
        layout: As of :class:`~cleave.architectures.cutting.stages.Stages`.
        bottleneck: Keyword arguments of ``build_bottleneck``; ``None`` quantises the
            feature itself.
        codec: ``bits``, ``range``, ``momentum``, ``coding`` and ``quality`` of
            :class:`~cleave.architectures.split.SplitNetwork`'s ``codec`` of kind ``uniform``.

    Raises:
        ValueError: An argument is out of range, or has no meaning beside exits.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        layout: str,
        bottleneck: Mapping[str, Any] | None = None,
        codec: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        self.shape = shape
        if bottleneck is not None:
            self.encoder, self.decoder, self.shape = build_bottleneck(
                shape, shape, layout, form="insert", **_known(bottleneck, "bottleneck.variance", "variance")
            )
        coding = _known(codec or {}, "codec.widths", "widths")
        if coding.get("kind", "uniform") != "uniform":
            raise ValueError(f"codec.kind={coding['kind']} has no meaning beside exits; use codec=uniform")
        self.coding = {key: value for key in ("coding", "quality") if (value := coding.pop(key, None)) is not None}
        self.quantizer = build_quantizer(coding, self.shape, axis=-1 if layout in VECTOR_LAYOUTS else 0)
        self.codec  # noqa: B018 what cannot be coded is refused here

    def forward(self, feature: Tensor) -> Tensor:
        """Return what arrives of a feature (B, *shape), in its layout."""
        z = self.encoder(feature)
        return self.decoder(self.quantizer(z).to(z.dtype))

    @property
    def codec(self) -> Codec:
        """How the representation becomes bytes, with the present bits and range."""
        return self.quantizer.codec(self.shape, **self.coding)

    def send(self, feature: Tensor) -> dict[str, Tensor]:
        """Return what the device sends of a feature (B, *shape), as the tensors that ``codec.encode`` takes."""
        codec = self.codec
        settings = (value.to(feature.device) for value in codec.settings.values())
        sent = self.quantizer.send(self.encoder(feature), *settings)
        return dict(zip(codec.sends, sent if isinstance(sent, tuple) else (sent,), strict=True))


def _known(settings: Mapping[str, Any], name: str, key: str) -> dict[str, Any]:
    """Return settings without one that has no meaning here; ValueError where it is set."""
    settings = dict(settings)
    if (value := settings.pop(key, None)) is not None:
        raise ValueError(f"{name}={value} has no meaning beside exits; leave it null")
    return settings
