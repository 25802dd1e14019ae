"""The partitions of a multi-exit network: one for each run of layers between its exits and its split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cleave.architectures.modes import evaluating
from cleave.architectures.multi_exit import FINAL, MultiExitNetwork
from cleave.architectures.normalize import Normalize
from cleave.deployment import Codec, ExitPolicy, ExitSpec, FloatCodec, ImageInput, Part

DEVICE, SERVER = "device", "server"


class ExitPart(nn.Module):
    """One partition: [normalise, or receive → decoder →] stage [→ exit] [→ encoder → send].

    Args:
        network: The network, whose modules are shared, not copied.
        index: Which of its stages.
        image_input: By which the first one normalises.
        takes: How many tensors it takes of what came before; settings and a cascade's logits follow them.
    """

    def __init__(self, network: MultiExitNetwork, index: int, image_input: ImageInput, takes: int) -> None:
        super().__init__()
        before, end = (None, *network.names)[index], (*network.names, FINAL)[index]
        bottleneck = network.bottleneck
        self.takes = takes
        self.receive: Callable[..., Tensor] = _first
        self.entering: nn.Module = Normalize(image_input) if index == 0 else nn.Identity()
        if bottleneck is not None and before == network.split:
            self.receive, self.entering = type(bottleneck.quantizer).receive, bottleneck.decoder
        # What is taken stays as it is, though the stage may begin with a layer that works in place.
        self.alters = network.stages.alters(index)
        self.stage = network.stages[index]
        exit = _exit_at(network, index)
        self.head = network.heads[exit] if exit is not None and exit < len(network.heads) else None
        self.cascade = network.cascade and self.head is not None and exit != 0
        sends = bottleneck is not None and end == network.split
        self.encoder = bottleneck.encoder if bottleneck is not None and sends else nn.Identity()
        self.quantizer = bottleneck.quantizer if bottleneck is not None and sends else None

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what is sent of (B, C, H, W) images or of what was received, and the exit's logits (B, classes)."""
        received, settings = tensors[: self.takes], tensors[self.takes :]
        before = None
        if self.cascade:
            settings, before = settings[:-1], settings[-1]
        x = self.entering(self.receive(*received))
        x = self.stage(x.clone() if self.alters else x)
        logits = None if self.head is None else self.head(x, before)
        if self.quantizer is not None:
            x = self.quantizer.send(self.encoder(x), *settings)
        if logits is None:
            return x
        return (*x, logits) if isinstance(x, tuple) else (x, logits)


def exit_parts(
    network: MultiExitNetwork, image_input: ImageInput, placements: Sequence[str] | None = None
) -> tuple[list[Part], list[Codec]]:
    """Describe a multi-exit network as partitions in the order of its route, with the codec of each edge between them.

    A partition ends at each exit and at the split, and is named for the layer it ends with: ``to_layer1`` …
    ``to_final``. The bottleneck's codec stands at the split; all other edges carry float32 features, which are handed
    over inside a placement and sent as real bytes between two.

    Args:
        network: The network.
        image_input: Its input; the first partition normalises by it.
        placements: Where each partition runs, free names such as ``device``, ``edge`` and ``server``; ``None``: up to
            and at the split on the ``device``, behind it on the ``server``.

    Returns:
        The parts, and one codec fewer than there are parts.

    Raises:
        ValueError: There are more or fewer placements than partitions, or none sends what the bottleneck makes.
    """
    ends = (*network.names, FINAL)
    names = [f"to_{end}" for end in ends]
    places = _placements(network, names, placements)
    codecs, costs = _codecs(network), network.profile()
    parts = []
    for index, (name, end, before) in enumerate(zip(names, ends, (None, *network.names), strict=True)):
        takes = 1 if index == 0 else len(codecs[index - 1].delivers)
        module = ExitPart(network, index, image_input, takes)
        inputs = part_inputs(codecs, index, before=module.cascade)
        outputs = part_outputs(codecs, index, exits=module.head is not None)
        runs = {f"to {end}", f"exit at {end}"}
        runs |= {part for part, at in (("encoder", end), ("decoder", before)) if at == network.split}
        macs = sum(cost["macs"] for part, cost in costs.items() if part in runs)
        parts.append(Part(name, places[index], module, inputs, outputs, macs))
    return parts, codecs


def exit_specs(
    network: MultiExitNetwork,
    parts: Sequence[Part],
    policy: ExitPolicy | None = None,
    accuracies: Mapping[str, float] | None = None,
) -> list[ExitSpec]:
    """Describe the exits of a network that was cut by :func:`exit_parts`.

    Their MACs are those of all partitions until there and of the policy. An exit at the split pays for the encoder
    beside it too, which :meth:`~cleave.architectures.MultiExitNetwork.exit_costs` leaves out: one partition runs both.

    Args:
        network: The network.
        parts: Its partitions.
        policy: Counts its own work at each exit as well, where it is not negligible.
        accuracies: What was measured of exits, by name.
    """
    specs: list[ExitSpec] = []
    macs = 0
    for index, part in enumerate(parts):
        macs += part.macs or 0
        if (exit := _exit_at(network, index)) is None:
            continue
        macs += 0 if policy is None else policy.macs(exit, network.classes)
        name = network.exit_names[exit]
        specs.append(ExitSpec(name, part.name, macs, (accuracies or {}).get(name)))
    return specs


def _placements(network: MultiExitNetwork, parts: Sequence[str], placements: Sequence[str] | None) -> list[str]:
    """Return where each partition runs."""
    sender = _sender(network)
    if placements is None:
        return [DEVICE if sender is None or index <= sender else SERVER for index in range(len(parts))]
    if isinstance(placements, str) or not all(isinstance(place, str) and place for place in placements):
        raise ValueError(f"placements are a list of names, got {placements!r}; write exits.placements=[device,server]")
    if len(placements) != len(parts):
        raise ValueError(
            f"placements has {len(placements)} names, but there are {len(parts)} partitions, {', '.join(parts)}; "
            "say for each where it runs"
        )
    if sender is not None and placements[sender] == placements[sender + 1]:
        raise ValueError(
            f"placements has {parts[sender]} and {parts[sender + 1]} both on {placements[sender]}: nothing is sent at "
            f"the split {network.split}, where the bottleneck stands; place them apart"
        )
    return list(placements)


@torch.no_grad()
def _codecs(network: MultiExitNetwork) -> list[Codec]:
    """Return the bottleneck's codec for the edge at the split, float32 for all others."""
    weight = next(network.stages.parameters())
    images = torch.zeros(1, *network.image_shape, device=weight.device, dtype=weight.dtype)
    with evaluating(network.stages):
        features = network.stages.features(images, at=network.names)
    codecs: list[Codec] = [FloatCodec(tuple(feature.shape[1:])) for feature in features.values()]
    if network.bottleneck is not None:
        codecs[network.names.index(network.split)] = network.bottleneck.codec
    return codecs


def _sender(network: MultiExitNetwork) -> int | None:
    """Which partition sends over the split, if there is one."""
    return None if network.split is None else network.names.index(network.split)


def _exit_at(network: MultiExitNetwork, index: int) -> int | None:
    """Which exit stands behind a partition, if there is one."""
    end = (*network.names, FINAL)[index]
    return network.exit_names.index(end) if end in network.exit_names else None


def _first(*received: Tensor) -> Tensor:
    return received[0]
