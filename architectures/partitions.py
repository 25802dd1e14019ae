"""The partitions of a network: what runs on the device, what runs on the server, and what passes between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cleave.architectures.costs import profile
from cleave.architectures.exit_partitions import exit_parts
from cleave.architectures.inserts.switchable import select
from cleave.architectures.multi_exit import MultiExitNetwork
from cleave.architectures.normalize import Normalize
from cleave.architectures.split import SplitNetwork
from cleave.deployment import Codec, ImageInput, Part


class WholePart(nn.Module):
    """An unsplit network: uint8 images to logits."""

    def __init__(self, network: nn.Module, image_input: ImageInput) -> None:
        super().__init__()
        self.normalize = Normalize(image_input)
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return self.network(self.normalize(images))


class DevicePart(nn.Module):
    """The device side: uint8 images to what its codec sends."""

    def __init__(self, network: SplitNetwork, image_input: ImageInput) -> None:
        super().__init__()
        self.normalize = Normalize(image_input)
        self.head = network.head if network.head is not None else nn.Identity()
        self.encoder = network.device_encoder()
        self.quantizer = network.quantizer

    def forward(self, images: Tensor, *settings: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return codes (B, ...), low (B,) and high (B,) for a number of levels; codes or z alone where none is set."""
        return self.quantizer.send(self.encoder(self.head(self.normalize(images))), *settings)


class ServerPart(nn.Module):
    """The server side: what the codec delivers to logits."""

    def __init__(self, network: SplitNetwork) -> None:
        super().__init__()
        self.decoder = network.decoder
        self.tail = network.tail
        self.receive = type(network.quantizer).receive
        self.switchable = bool(network.widths)

    def forward(self, *received: Tensor) -> Tensor:
        """Return logits (B, classes) from (codes, low, high, levels), from codes, or from z."""
        if self.switchable:
            for part in (self.decoder, self.tail):
                select(part, received[-1])
        return self.tail(self.decoder(self.receive(*received)))


def export_parts(
    network: nn.Module, image_input: ImageInput, placements: Sequence[str] | None = None
) -> tuple[list[Part], list[Codec]]:
    """Describe a network as partitions in the order of its route, with the codec of each edge between them.

    Args:
        network: A :class:`~cleave.architectures.split.SplitNetwork`, cut into device and server; a
            ``MultiExitNetwork``, cut at its exits as well; or any other network, which
            makes one partition for the device. A channel that disturbs the link is no part of either.
        image_input: The network's input; the first partition normalises by it.
        placements: Where each partition of a multi-exit network runs; see
            :func:`~cleave.architectures.exit_partitions.exit_parts`.

    Returns:
        The parts, and one codec fewer than there are parts.

    Raises:
        ValueError: ``placements`` do not fit, or are given for a network without exits.
    """
    if isinstance(network, MultiExitNetwork):
        return exit_parts(network, image_input, placements)
    if placements is not None:
        raise ValueError(f"placements={list(placements)} are for networks with exits; leave them null for this one")
    if not isinstance(network, SplitNetwork):
        cost = profile(network, image_input.shape)["whole"]["macs"]
        return [Part("whole", "device", WholePart(network, image_input), ("images",), ("logits",), cost)], []
    codec = network.codec
    macs = {part: cost["macs"] for part, cost in network.profile().items()}
    on_device, on_server = macs.get("head", 0) + macs["encoder"], macs["decoder"] + macs["tail"]
    device, server = DevicePart(network, image_input), ServerPart(network)
    return [
        Part("device", "device", device, ("images", *codec.settings), codec.sends, on_device),
        Part("server", "server", server, codec.delivers, ("logits",), on_server),
    ], [codec]
