"""Networks from a backbone and what is to stand behind its layers: the way in for Python users and configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cleave.architectures.copying import cut_copy
from cleave.architectures.cutting.cut_points import cut_points, spread
from cleave.architectures.furnishing import INSERT, REPLACE, Chain, Furnishing, Settings, check_exits
from cleave.architectures.inserts.channels import Channel
from cleave.architectures.inserts.insert import Insert
from cleave.architectures.layer_depths import layer_depths
from cleave.architectures.network.outputs import RESERVED
from cleave.architectures.network.staged import StagedNetwork
from cleave.architectures.noise.noise import Noise


def staged_network(
    backbone: nn.Module,
    sample: Tensor,
    *,
    cuts: Sequence[str] = (),
    split: str | Sequence[str] | None = None,
    form: str = REPLACE,
    bottleneck: Settings = None,
    bottleneck_at: Mapping[str, Settings] | None = None,
    codec: Settings = None,
    codec_at: Mapping[str, Settings] | None = None,
    noise: Noise | None = None,
    channel: Channel | None = None,
    exits: Sequence[str] | None = None,
    exits_count: int | None = None,
    exit_head: Settings = None,
    cascade: bool = False,
    ensemble: bool = False,
    ensemble_last: bool = True,
    gradient_equilibrium: bool = False,
    inserts: Mapping[str, Sequence[Insert]] | None = None,
) -> StagedNetwork:
    """Build a network from a backbone: cuts, bottlenecks, early exits and other inserts, whichever are named.

    Where nothing cuts it, the backbone itself is the only stage, untraced. Otherwise it is cut from a deep copy, so
    that freezing a part never freezes the backbone (or a teacher) that it came from.

    Args:
        backbone: Network that maps inputs to logits (B, classes), or to any other tensor or tensors.
        sample: A batch of inputs of the size the network will see; one is enough.
        cuts: Further layers whose features are outputs, in any order.
        split: The layer or layers with a bottleneck, in any order.
        form: ``replace``: the first bottleneck takes the place of all before it, as in head-network distillation;
            ``insert``: an autoencoder behind the layer, as in reconstruction and as token features need it; ``none``:
            the feature itself is quantised and sent.
        bottleneck: Keyword arguments of :func:`~cleave.architectures.build_bottleneck`, or what is called in its place;
            ``None`` takes its defaults.
        bottleneck_at: The same for single layers.
        codec: Keyword arguments of :func:`~cleave.architectures.uniform_codec`, or what is called in its place with
            ``shape`` and ``axis``, such as :func:`~cleave.architectures.entropy_codec`.
        codec_at: The same for single layers.
        noise: What the device lays over each representation before it is quantised; ``None``: nothing.
        channel: The link behind each bottleneck; ``None``: a perfect one.
        exits: Layers with an early exit, in any order; or ``exits_count``.
        exits_count: Number of exits before the last one, at even shares of the backbone's MACs.
        exit_head: Keyword arguments of :class:`~cleave.architectures.ExitHead`, or what is called in its place with
            shape, layout and the number of classes.
        cascade: Whether each exit also reads the class probabilities of the one before.
        ensemble: Whether each exit answers with the weighted geometric mean of all exits so far.
        ensemble_last: Whether the last exit does so too; else it answers by itself.
        gradient_equilibrium: As of :class:`~cleave.architectures.StagedNetwork`.
        inserts: Other inserts by layer; they pass the feature on before a bottleneck there, and behind one that
            replaces all before it.

    Raises:
        CutError: A layer is unknown, is crossed by several tensors, or stands where it cannot.
        ValueError: An argument is out of range, or stands for a layer that is not split.
    """
    if isinstance(cuts, str):
        raise ValueError(f"cuts is a list of layers, got the string {cuts!r}; write cuts=[{cuts!r}]")
    splits = [] if split is None else [split] if isinstance(split, str) else list(split)
    exit_cuts = _exit_cuts(backbone, sample, exits, exits_count)
    furnishing = Furnishing(
        splits=splits,
        form=form,
        bottleneck=bottleneck,
        bottleneck_at=bottleneck_at,
        codec=codec,
        codec_at=codec_at,
        noise=noise,
        channel=channel,
        exits=exit_cuts,
        exit_head=exit_head,
        cascade=cascade,
        ensemble=ensemble,
        ensemble_last=ensemble_last,
        gradient_equilibrium=gradient_equilibrium,
        inserts=inserts,
    )
    stages, features = cut_copy(backbone, list(dict.fromkeys([*furnishing.layers, *cuts])), sample)
    network = furnishing.build(Chain(stages, features), sample)
    network.layer_depths = layer_depths(backbone)
    return network


def split_network(
    backbone: nn.Module,
    at: str | Sequence[str],
    sample: Tensor,
    *,
    form: str = REPLACE,
    bottleneck: Settings = None,
    codec: Settings = None,
    noise: Noise | None = None,
    channel: Channel | None = None,
    cuts: Sequence[str] = (),
) -> StagedNetwork:
    """Build a network that is split: [head →] encoder → quantiser [→ channel] → decoder → tail.

    Args:
        backbone: As of :func:`staged_network`, like all others.
        at: The layer or layers to split at.
        sample: A batch of inputs.
        form: ``replace``, ``insert`` or ``none``.
        bottleneck: Settings of encoder and decoder.
        codec: Settings of the quantiser.
        noise: What the device lays over the representation.
        channel: The link.
        cuts: Further layers whose features are outputs.
    """
    settings = {"form": form, "bottleneck": bottleneck, "codec": codec, "noise": noise, "channel": channel}
    return staged_network(backbone, sample, split=at, cuts=cuts, **settings)  # type: ignore[arg-type]


def multi_exit_network(
    backbone: nn.Module,
    sample: Tensor,
    *,
    at: Sequence[str] | None = None,
    count: int | None = None,
    head: Settings = None,
    cascade: bool = False,
    ensemble: bool = False,
    ensemble_last: bool = True,
    gradient_equilibrium: bool = False,
    split: str | Sequence[str] | None = None,
    form: str = INSERT,
    bottleneck: Settings = None,
    codec: Settings = None,
    noise: Noise | None = None,
    channel: Channel | None = None,
) -> StagedNetwork:
    """Build a network with early exits; its own classifier counts as the last one.

    With a ``split`` a bottleneck stands between them, as in SPINN (Laskaridis et al. 2020) and Boomerang (Zeng et al.
    2019): exits up to and at the split run on the device, those behind it on what was sent.

    Args:
        backbone: As of :func:`staged_network`, like all others.
        sample: A batch of inputs.
        at: Layers with an exit. Either this or ``count``.
        count: Number of exits before the last one, at even shares of the backbone's MACs.
        head: Settings of the exits' classifiers.
        cascade: Whether each exit also reads the class probabilities of the one before.
        ensemble: Whether each exit answers with the weighted geometric mean of all exits so far.
        ensemble_last: Whether the last exit does so too; else it answers by itself.
        gradient_equilibrium: Scale gradients where exits branch off.
        split: The layer or layers behind which a bottleneck is inserted.
        form: ``insert``, ``replace`` or ``none``.
        bottleneck: Settings of encoder and decoder.
        codec: Settings of the quantiser.
        noise: What the device lays over the representation.
        channel: The link.
    """
    check_exits(at, count, "at", "count")
    if at is None and count is None:
        raise ValueError("give either at or count, the exits' layers or their number; got none of them")
    if split is None and any(each is not None for each in (bottleneck, codec, noise, channel)):
        raise ValueError("bottleneck, codec, noise and channel stand at a split; give split, or leave them None")
    return staged_network(
        backbone,
        sample,
        split=split,
        form=form,
        bottleneck=bottleneck,
        codec=codec,
        noise=noise,
        channel=channel,
        exits=at,
        exits_count=count,
        exit_head=head,
        cascade=cascade,
        ensemble=ensemble,
        ensemble_last=ensemble_last,
        gradient_equilibrium=gradient_equilibrium,
    )


def _exit_cuts(backbone: nn.Module, sample: Tensor, at: Sequence[str] | None, count: int | None) -> list[str]:
    """Return the layers that get an exit."""
    check_exits(at, count, "exits", "exits_count")
    if count is not None:
        points = cut_points(backbone, sample)
        return spread([point for point in points if point.name not in RESERVED], count)
    return list(at or ())
