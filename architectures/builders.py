"""Networks from a backbone and what is to stand behind its layers: the way in for Python users and configs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures.cutting.cut_points import cut_points, spread
from cleave.architectures.cutting.stages import LOGITS, CutError, Stages, cut
from cleave.architectures.inserts.bottleneck import Bottleneck
from cleave.architectures.inserts.channels import Channel
from cleave.architectures.inserts.codecs import uniform_codec
from cleave.architectures.inserts.coders import FORMS, VECTOR_LAYOUTS, Coders, build_bottleneck
from cleave.architectures.inserts.exit_head import ExitHead
from cleave.architectures.inserts.insert import Insert
from cleave.architectures.layer_depths import layer_depths
from cleave.architectures.modes import evaluating
from cleave.architectures.naming import did_you_mean, whole_number
from cleave.architectures.network.ensemble import GeometricEnsemble
from cleave.architectures.network.outputs import FINAL, RESERVED
from cleave.architectures.network.staged import StagedNetwork
from cleave.deployment.bundle.torchscript import is_scripted

REPLACE, INSERT, NONE = "replace", "insert", "none"
Settings = Mapping[str, Any] | Callable[..., Any] | None


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
    names = list(dict.fromkeys([*exit_cuts, *splits, *cuts, *(inserts or {})]))
    _check(splits, form, {"bottleneck_at": bottleneck_at, "codec_at": codec_at})
    if ensemble and not exit_cuts:
        raise ValueError("ensemble=True makes one answer of several exits; give exits or exits_count")
    if not ensemble_last and not ensemble:
        raise ValueError("ensemble_last=False has no meaning without an ensemble; give ensemble=True, or leave it out")
    stages, features = _cut(backbone, names, sample)
    splits = [name for name in stages.names if name in splits]
    exit_cuts = [name for name in stages.names if name in exit_cuts]
    if splits and form == REPLACE and (before := stages.names[: stages.names.index(splits[0])]):
        what = "exits" if set(before) & set(exit_cuts) else "layers compared"
        raise CutError(
            f"the {what} ({', '.join(before)}) must stand behind the split at {splits[0]!r}: form=replace leaves out "
            "what stands before it; use form=insert, or other layers"
        )
    behind: dict[str, list[Insert]] = {name: list((inserts or {}).get(name, ())) for name in stages.names}
    layouts = dict(zip(stages.names, stages.layouts, strict=True))
    for number, name in enumerate(exit_cuts):
        head = _exit(exit_head, features, name, layouts[name], cascade and number > 0, stages.names)
        if cascade and number:
            head.before = f"{exit_cuts[number - 1]}/logits"
        behind[name].append(head)
    for number, name in enumerate(splits):
        own = form if number == 0 or form != REPLACE else INSERT
        source = tuple(sample.shape[1:]) if own == REPLACE else tuple(features[name].shape[1:])
        settings = (bottleneck_at or {}).get(name, bottleneck), (codec_at or {}).get(name, codec)
        made = _bottleneck(source, tuple(features[name].shape[1:]), layouts[name], own, *settings, channel)
        behind[name].insert(0 if own == REPLACE else len(behind[name]), made)
    network = StagedNetwork(
        stages,
        behind,
        sample=sample,
        replaced=bool(splits) and form == REPLACE,
        ensemble=GeometricEnsemble(len(exit_cuts) + 1, features[LOGITS].shape[-1], ensemble_last) if ensemble else None,
        gradient_equilibrium=gradient_equilibrium,
    )
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
        channel: The link.
        cuts: Further layers whose features are outputs.
    """
    settings = {"form": form, "bottleneck": bottleneck, "codec": codec, "channel": channel}
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
        channel: The link.
    """
    _check_exits(at, count, "at", "count")
    if at is None and count is None:
        raise ValueError("give either at or count, the exits' layers or their number; got none of them")
    if split is None and any(each is not None for each in (bottleneck, codec, channel)):
        raise ValueError("bottleneck, codec and channel stand at a split; give split, or leave them None")
    return staged_network(
        backbone,
        sample,
        split=split,
        form=form,
        bottleneck=bottleneck,
        codec=codec,
        channel=channel,
        exits=at,
        exits_count=count,
        exit_head=head,
        cascade=cascade,
        ensemble=ensemble,
        ensemble_last=ensemble_last,
        gradient_equilibrium=gradient_equilibrium,
    )


def _check(splits: Sequence[str], form: str, single: Mapping[str, Mapping[str, Settings] | None]) -> None:
    if form not in (*FORMS, NONE):
        raise ValueError(f"form must be one of {', '.join(FORMS)} or none, got {form!r}")
    if taken := [name for name in splits if name in (FINAL, LOGITS)]:
        raise CutError(f"split names {taken[0]!r}, which stands for the last exit; split behind an earlier layer")
    if repeated := [name for name in splits if list(splits).count(name) > 1]:
        raise CutError(f"split names {repeated[0]!r} twice; one bottleneck stands behind a layer")
    for argument, settings in single.items():
        for name in settings or {}:
            if name not in splits:
                have = f"split is at {', '.join(splits)}" if splits else "there is no split"
                raise ValueError(f"{argument} names {name!r}, but {have}.{did_you_mean(name, splits)}")


def _cut(backbone: nn.Module, names: Sequence[str], sample: Tensor) -> tuple[Stages, dict[str, Any]]:
    """Cut a copy of the backbone in the order in which it runs its layers; return it in train mode, with its features.

    Without names the backbone is the only stage, and nothing is known of its features.
    """
    if not names:
        return Stages([backbone], ()).train(), {LOGITS: None}
    backbone = copy.deepcopy(unscripted(backbone))
    stages = cut(backbone, at=in_order(backbone, names, sample), sample=sample)
    with torch.no_grad(), evaluating(stages):
        features: dict[str, Any] = stages.features(sample[:1].clone(), at=[*names, LOGITS])
    return stages.train(), features


def unscripted(backbone: nn.Module) -> nn.Module:
    """Return a backbone, unless some of it is scripted.

    Raises:
        CutError: A layer is scripted: a copy of it computes with weights that no optimizer reaches.
    """
    for name, layer in backbone.named_modules():
        if is_scripted(layer):
            raise CutError(
                f"layer {name!r} of {type(backbone).__name__} is scripted, and a copy of it would not learn; build it "
                "without scripting"
            )
    return backbone


def in_order(backbone: nn.Module, names: Sequence[str], sample: Tensor) -> list[str]:
    """Return the names of some layers in the order in which a backbone runs them.

    Raises:
        CutError: There is no layer of a name.
    """
    layers = dict(backbone.named_modules())
    for name in names:
        if not name or name not in layers:
            raise CutError(f"{type(backbone).__name__} has no layer {name!r}.{did_you_mean(name, layers)}")
    if len(names) < 2:
        return list(names)
    order: list[str] = []
    hooks = [layers[name].register_forward_hook(lambda *_, name=name: order.append(name)) for name in names]
    with torch.no_grad(), evaluating(backbone):
        backbone(sample[:1].clone())  # it may work in place
    for hook in hooks:
        hook.remove()
    last_call = {name: i for i, name in enumerate(order)}
    return sorted(names, key=lambda name: last_call.get(name, -1))


def _exit_cuts(backbone: nn.Module, sample: Tensor, at: Sequence[str] | None, count: int | None) -> list[str]:
    """Return the layers that get an exit."""
    _check_exits(at, count, "exits", "exits_count")
    if count is not None:
        points = cut_points(backbone, sample)
        return spread([point for point in points if point.name not in RESERVED], count)
    return list(at or ())


def _check_exits(at: Sequence[str] | None, count: int | None, layers: str, number: str) -> None:
    """Check what says where exits stand, under the names of the two arguments."""
    if at is not None and count is not None:
        raise ValueError(f"give either {layers} or {number}, got {at} and {count}")
    if count is not None:
        whole_number(number, count)
    if at is None:
        return
    if isinstance(at, str) or not at:
        raise ValueError(f"{layers} is a list of at least one layer, got {at!r}; write {layers}=['layer1']")
    if repeated := [name for name in at if list(at).count(name) > 1]:
        raise CutError(f"{layers} names {repeated[0]!r} twice; each layer takes one exit")
    if taken := [name for name in at if name in (FINAL, LOGITS)]:
        raise CutError(f"{layers} names {taken[0]!r}: the backbone's own classifier is the last exit already")


def _exit(
    settings: Settings, features: Mapping[str, Any], name: str, layout: str, cascade: bool, cuts: Sequence[str]
) -> ExitHead:
    """Build an exit; refuse one where there is nothing left to save."""
    logits = features[LOGITS]
    if not isinstance(logits, Tensor) or (logits.ndim != 2 and not callable(settings)):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"exits classify, so the backbone must return logits (B, classes); got {got}; wrap it in a "
            "module that returns them"
        )
    if name == cuts[-1] and features[name].shape == logits.shape and torch.equal(features[name], logits):
        raise CutError(f"an exit at {name!r} stands behind the last layer, where nothing is left to save")
    shape, classes = tuple(features[name].shape[1:]), logits.shape[1]
    if callable(settings):
        return settings(shape, layout, classes, cascade=cascade)
    return ExitHead(shape, layout, classes, **(settings or {}), cascade=cascade)


def _bottleneck(
    source: tuple[int, ...],
    target: tuple[int, ...],
    layout: str,
    form: str,
    coders: Settings,
    codec: Settings,
    channel: Channel | None,
) -> Bottleneck:
    if form == NONE:
        if coders is not None:
            raise ValueError("form=none sends the feature itself; leave bottleneck None")
        built = Coders(nn.Identity(), nn.Identity(), target)
    else:
        build = coders if callable(coders) else build_bottleneck
        more = {} if coders is None or callable(coders) else dict(coders)
        built = build(source, target, layout, form=form, **more)
    axis = -1 if layout in VECTOR_LAYOUTS else 0
    quantise = codec if callable(codec) else uniform_codec
    quantizer = quantise(shape=built.shape, axis=axis, **({} if codec is None or callable(codec) else dict(codec)))
    return Bottleneck(built.encoder, quantizer, built.decoder, shape=built.shape, channel=copy.deepcopy(channel))
