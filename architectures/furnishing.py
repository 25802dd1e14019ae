"""What stands behind the cuts of a chain of stages: bottlenecks, early exits, links and other inserts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cleave.architectures.costs import Cost
from cleave.architectures.cutting.stages import LOGITS, CutError, Stages
from cleave.architectures.inserts.bottleneck import Bottleneck
from cleave.architectures.inserts.channels import Channel
from cleave.architectures.inserts.codecs import uniform_codec
from cleave.architectures.inserts.coders import FORMS, VECTOR_LAYOUTS, Coders, build_bottleneck
from cleave.architectures.inserts.exit_head import ExitHead
from cleave.architectures.inserts.insert import Insert
from cleave.architectures.linking.link import Link
from cleave.architectures.naming import did_you_mean, whole_number
from cleave.architectures.network.ensemble import GeometricEnsemble
from cleave.architectures.network.outputs import FINAL
from cleave.architectures.network.staged import StagedNetwork
from cleave.architectures.noise.noise import Noise
from cleave.deployment import FLOAT_BITS

REPLACE, INSERT, NONE = "replace", "insert", "none"
Settings = Mapping[str, Any] | Callable[..., Any] | None


class Chain(NamedTuple):
    """Stages in a row, of one network or of two, before anything stands behind their cuts.

    Attributes:
        stages: The stages.
        features: The feature that arrives at each cut for a sample, and the results under ``logits``.
        links: The links of a path through two networks, by the cut that they stand at.
        crossings: The cuts at which a path passes to the other network; what passes there is sent, in float32 where
            nothing else is said.
        left_out: What a path leaves out of the local network costs.
    """

    stages: Stages
    features: Mapping[str, Any]
    links: Mapping[str, Link] = {}
    crossings: tuple[str, ...] = ()
    left_out: tuple[Cost, ...] = ()


@dataclasses.dataclass(frozen=True)
class Furnishing:
    """What is to stand behind the cuts; the arguments are those of :func:`~cleave.architectures.staged_network`.

    Raises:
        CutError: A layer is named twice, or stands for the last exit.
        ValueError: An argument is out of range, or stands for a layer that is not split.
    """

    splits: Sequence[str] = ()
    form: str = INSERT
    bottleneck: Settings = None
    bottleneck_at: Mapping[str, Settings] | None = None
    codec: Settings = None
    codec_at: Mapping[str, Settings] | None = None
    noise: Noise | None = None
    channel: Channel | None = None
    exits: Sequence[str] = ()
    exit_head: Settings = None
    cascade: bool = False
    ensemble: bool = False
    ensemble_last: bool = True
    gradient_equilibrium: bool = False
    inserts: Mapping[str, Sequence[Insert]] | None = None

    def __post_init__(self) -> None:
        _check(self.splits, self.form, {"bottleneck_at": self.bottleneck_at, "codec_at": self.codec_at})
        if self.ensemble and not self.exits:
            raise ValueError("ensemble=True makes one answer of several exits; give exits or exits_count")
        if not self.ensemble_last and not self.ensemble:
            raise ValueError(
                "ensemble_last=False has no meaning without an ensemble; give ensemble=True, or leave it out"
            )

    @property
    def layers(self) -> list[str]:
        """Names of the layers that something stands behind."""
        return list(dict.fromkeys([*self.exits, *self.splits, *(self.inserts or {})]))

    def build(self, chain: Chain, sample: Tensor) -> StagedNetwork:
        """Return the network: exits and bottlenecks are built in the order of the stages."""
        names, features = chain.stages.names, chain.features
        splits = [name for name in names if name in self.splits]
        exits = [name for name in names if name in self.exits]
        self._check_order(splits, exits, names)
        behind: dict[str, list[Insert]] = {name: list((self.inserts or {}).get(name, ())) for name in names}
        layouts = dict(zip(names, chain.stages.layouts, strict=True))
        for number, name in enumerate(exits):
            cascade = self.cascade and number > 0
            head = _exit(self.exit_head, features, name, layouts[name], cascade, names)
            if cascade:
                head.before = f"{exits[number - 1]}/logits"
            behind[name].append(head)
        for number, name in enumerate(splits):
            own = self.form if number == 0 or self.form != REPLACE else INSERT
            target, layout = _sent(chain, name, layouts[name])
            source = tuple(sample.shape[1:]) if own == REPLACE else target
            coders, codec = ((at or {}).get(name, usual) for at, usual in self._settings)
            made = _bottleneck(source, target, layout, own, coders, codec, self.noise, self.channel)
            behind[name].insert(0 if own == REPLACE else len(behind[name]), made)
        for name in (cut for cut in chain.crossings if cut not in splits):
            target, layout = _sent(chain, name, layouts[name])
            behind[name].append(
                _bottleneck(target, target, layout, NONE, None, {"bits": FLOAT_BITS}, self.noise, self.channel)
            )
        owners = dict(zip(names, chain.stages.owners, strict=False))
        for name, link in chain.links.items():
            behind[name].insert(0 if link.owner == owners[name] else len(behind[name]), link)
        return StagedNetwork(
            chain.stages,
            behind,
            sample=sample,
            replaced=bool(splits) and self.form == REPLACE,
            ensemble=GeometricEnsemble(len(exits) + 1, features[LOGITS].shape[-1], self.ensemble_last)
            if self.ensemble
            else None,
            gradient_equilibrium=self.gradient_equilibrium,
            left_out=chain.left_out,
        )

    @property
    def _settings(self) -> tuple[tuple[Mapping[str, Settings] | None, Settings], ...]:
        return (self.bottleneck_at, self.bottleneck), (self.codec_at, self.codec)

    def _check_order(self, splits: Sequence[str], exits: Sequence[str], names: Sequence[str]) -> None:
        if splits and self.form == REPLACE and (before := names[: names.index(splits[0])]):
            what = "exits" if set(before) & set(exits) else "layers compared"
            raise CutError(
                f"the {what} ({', '.join(before)}) must stand behind the split at {splits[0]!r}: form=replace leaves "
                "out what stands before it; use form=insert, or other layers"
            )


def _sent(chain: Chain, name: str, layout: str) -> tuple[tuple[int, ...], str]:
    """Return shape and layout of what a bottleneck at a cut reads: the feature there, or what a link makes of it."""
    link, owners = chain.links.get(name), dict(zip(chain.stages.names, chain.stages.owners, strict=False))
    if link is not None and link.owner == owners[name]:
        return link.target.shape, link.target.layout
    return tuple(chain.features[name].shape[1:]), layout


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
    noise: Noise | None,
    channel: Channel | None,
) -> Bottleneck:
    if form == NONE:
        if coders is not None:
            raise ValueError("form=none sends the feature itself; leave bottleneck None")
        built = Coders(nn.Identity(), nn.Identity(), target)
    else:
        build = coders if callable(coders) else build_bottleneck
        settings = {} if coders is None or callable(coders) else dict(coders)
        built = build(source, target, layout, form=form, **settings)
    axis = -1 if layout in VECTOR_LAYOUTS else 0
    quantise = codec if callable(codec) else uniform_codec
    quantizer = quantise(shape=built.shape, axis=axis, **({} if codec is None or callable(codec) else dict(codec)))
    channel, noise = copy.deepcopy(channel), copy.deepcopy(noise)
    return Bottleneck(
        built.encoder, quantizer, built.decoder, shape=built.shape, channel=channel, noise=noise, axis=axis
    )


def check_exits(at: Sequence[str] | None, count: int | None, layers: str, number: str) -> None:
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
