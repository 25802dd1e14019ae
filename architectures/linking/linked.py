"""The network that a path makes of two: local blocks, links, blocks of the host, and local blocks again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cleave.architectures.cutting.cut_points import CutPoint, spread
from cleave.architectures.cutting.stages import LOGITS, Stages
from cleave.architectures.furnishing import INSERT, Chain, Furnishing, Settings, check_exits
from cleave.architectures.inserts.channels import Channel
from cleave.architectures.inserts.insert import Insert
from cleave.architectures.linking.blocks import Blocks, cut_blocks
from cleave.architectures.linking.link import HOST, LOCAL, make_link
from cleave.architectures.linking.path import Path, is_no_block, read_path
from cleave.architectures.macs import count_macs, count_params
from cleave.architectures.naming import did_you_mean
from cleave.architectures.network.outputs import INPUT
from cleave.architectures.network.staged import StagedNetwork
from cleave.architectures.noise.noise import Noise

Links = Mapping[str, Any] | Callable[..., nn.Module] | None


def linked_network(
    local: nn.Module,
    host: nn.Module | None,
    samples: Sequence[Tensor],
    blocks: Sequence[Sequence[str] | int | None],
    path: Sequence[Any],
    links: Links = None,
    *,
    use_host: bool = True,
    prefix: Sequence[int | None] = (None, None),
    cuts: Sequence[str] = (),
    split: str | Sequence[str] | None = None,
    form: str = INSERT,
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
    """Build a network whose way leads over trained links through blocks of another network, or past its own.

    After "Coordinated Deep Neural Networks: A Versatile Edge Offloading Algorithm" (2023) and "Edge AI as a Service
    with Coordinated Deep Neural Networks" (2024), of which there is no public code: how a link resizes, normalises and
    activates is reconstructed. Both networks are cut from deep copies, each at a sample of its own; they keep their
    weights where only ``links`` are trained.

    What else can stand behind a layer can stand on the way too, under qualified names: ``local/layer1``,
    ``host/layer3``. What passes from one side to the other is sent as float32, unless ``split`` names the crossing:
    then a bottleneck stands there, in front of the entry link or behind the exit link, which both live on the host.

    Args:
        local: The network whose results these are.
        host: The network that lends its blocks; ``None`` on a skip-connection.
        samples: A batch of inputs of the local network, and one of the host's, which may be of another size.
        blocks: The blocks of both: the last layer of each, by any name of its tensor, or their number, at even shares
            of the MACs.
        path: lout, hin, hout and lin, numbers or names of blocks; ``None`` for hin and hout on a skip-connection.
        links: Keyword arguments of :func:`~cleave.architectures.build_link`, or what is called in its place with the
            :class:`~cleave.architectures.Feature` that a link reads and the one that it makes.
        use_host: Whether the host's blocks run; else the path has its links alone, as the papers' "just links".
        prefix: Tokens in front of the grid of tokens of both networks, such as a class token; ``None``: the fewest that
            leave a grid of the image's form.
        cuts: Further layers whose features are outputs.
        split: The layer or layers with a bottleneck.
        form: As of :func:`~cleave.architectures.staged_network`, like all others.
        bottleneck: Settings of encoder and decoder.
        bottleneck_at: The same for single layers.
        codec: Settings of the quantiser.
        codec_at: The same for single layers.
        noise: What a sender lays over each representation before it is quantised.
        channel: What disturbs each crossing and each bottleneck.
        exits: Layers with an early exit; or ``exits_count``.
        exits_count: Number of exits before the last one, at even shares of the MACs of the path's blocks.
        exit_head: Settings of the exits' classifiers.
        cascade: Whether each exit also reads the class probabilities of the one before.
        ensemble: Whether each exit answers with the weighted geometric mean of all exits so far.
        ensemble_last: Whether the last exit does so too.
        gradient_equilibrium: Scale gradients where exits branch off.
        inserts: Other inserts by layer.

    Raises:
        CutError: A layer is unknown, or cannot be cut at; a network does not run on its sample.
        ValueError: The path leads nowhere; both networks are one; no link fits; an argument is out of range.
    """
    if host is not None and host is local:
        raise ValueError("local and host are one network; links lead through the blocks of another one")
    if host is not None and isinstance(path, Sequence) and len(path) == 4 and all(map(is_no_block, path[1:3])):
        raise ValueError(f"path={list(path)} is a skip-connection, on which no host runs; give host=None")
    check_exits(exits, exits_count, "exits", "exits_count")
    furnishing = Furnishing(
        splits=[] if split is None else [split] if isinstance(split, str) else list(split),
        form=form,
        bottleneck=bottleneck,
        bottleneck_at=bottleneck_at,
        codec=codec,
        codec_at=codec_at,
        noise=noise,
        channel=channel,
        exits=list(exits or ()),
        exit_head=exit_head,
        cascade=cascade,
        ensemble=ensemble,
        ensemble_last=ensemble_last,
        gradient_equilibrium=gradient_equilibrium,
        inserts=inserts,
    )
    named = _by_owner([*furnishing.layers, *cuts])
    cut = {
        owner: cut_blocks(network, sample, names, owner, cuts=named[owner], prefix=tokens)
        for network, sample, names, owner, tokens in zip(
            (local, host),
            _two("samples", samples),
            _two("blocks", blocks),
            (LOCAL, HOST),
            _two("prefix", prefix),
            strict=True,
        )
        if network is not None
    }
    return link_blocks(
        cut[LOCAL], cut.get(HOST), path, links, use_host=use_host, furnishing=furnishing, exits_count=exits_count
    )


def link_blocks(
    local: Blocks,
    host: Blocks | None,
    path: Sequence[Any],
    links: Links = None,
    *,
    use_host: bool = True,
    furnishing: Furnishing | None = None,
    exits_count: int | None = None,
) -> StagedNetwork:
    """Build the network of a path through blocks that are cut already, with whose other paths it shares its stages.

    Args:
        local: The local network's blocks.
        host: The host's; ``None`` on a skip-connection.
        path: As of :func:`linked_network`, like all others.
        links: Settings of the links.
        use_host: Whether the host's blocks run.
        furnishing: What else stands behind layers.
        exits_count: Number of exits, instead of those of ``furnishing``.

    Raises:
        ValueError: As of :func:`linked_network`.
    """
    if host is not None and host.source is local.source:
        raise ValueError("local and host are one network; links lead through the blocks of another one")
    way = read_path(_named(path, local, host), local.names, None if host is None else host.names)
    if way.skips and not use_host:
        raise ValueError(f"use_host=False has no meaning for path={way}, a skip-connection; leave it out")
    features = {f"{LOCAL}/{name}": value for name, value in local.features.items()}
    features |= {INPUT: local.sample, LOGITS: local.features[LOGITS]}
    if way.skips:
        chain = _skip(local, way, links, features)
    else:
        assert host is not None
        chain = _cross(local, host, way, links, use_host, features)
    left_out = local.costs(local.numbers(way.lout + 1, way.lin - 1)) if way.lin > way.lout + 1 else []
    chain = chain._replace(left_out=tuple(left_out))
    called = _called(furnishing or Furnishing(), chain.stages.names, local, host, way)
    if exits_count is not None:
        called = dataclasses.replace(called, exits=_spread(chain, exits_count))
    return called.build(chain, local.sample)


def _named(path: Sequence[Any], local: Blocks, host: Blocks | None) -> Sequence[Any]:
    """Return a path with blocks called by their own names."""
    if isinstance(path, str) or not isinstance(path, Sequence):
        return path
    owners = (local, host, host, local)
    blocks = zip(path, [*owners, *[None] * len(path)], strict=False)
    return [value if owner is None or not isinstance(value, str) else owner.layer(value) for value, owner in blocks]


def _skip(local: Blocks, way: Path, links: Links, features: Mapping[str, Any]) -> Chain:
    """Return the chain of a skip-connection."""
    out, stands_for = f"{LOCAL}/{local.names[way.lout]}", f"{LOCAL}/{local.names[way.lin - 1]}"
    link = make_link(links, local.behind(way.lout), local.before(way.lin), LOCAL, stands_for)
    runs = [(LOCAL, local.stages, numbers) for numbers in (local.numbers(0, way.lout), local.numbers(way.lin))]
    return Chain(Stages.chained(runs), features, {out: link})


def _cross(local: Blocks, host: Blocks, way: Path, links: Links, use_host: bool, features: Mapping[str, Any]) -> Chain:
    """Return the chain of a cross-connection."""
    assert way.hin is not None
    assert way.hout is not None
    entered, name = host.before(way.hin), host.names[way.hout]
    if use_host:
        stages, numbers, left = host.stages, host.numbers(way.hin, way.hout), host.behind(way.hout)
        made = {f"{HOST}/{cut}": value for cut, value in host.features.items()}
    else:
        # Links alone: what the entry link makes leaves the host as it came.
        stages, numbers, left = _nothing(name, entered.layout), range(1), entered
        made = {f"{HOST}/{name}": host.sample.new_zeros(1, *entered.shape)}
    enters, back = host.names[way.hin - 1] if way.hin else INPUT, local.names[way.lin - 1]
    links_at = {
        f"{LOCAL}/{local.names[way.lout]}": make_link(links, local.behind(way.lout), entered, HOST, f"{HOST}/{enters}"),
        f"{HOST}/{name}": make_link(links, left, local.before(way.lin), HOST, f"{LOCAL}/{back}"),
    }
    runs = [
        (LOCAL, local.stages, local.numbers(0, way.lout)),
        (HOST, stages, numbers),
        (LOCAL, local.stages, local.numbers(way.lin)),
    ]
    return Chain(Stages.chained(runs), {**features, **made}, links_at, tuple(links_at))


def _nothing(name: str, layout: str) -> Stages:
    """Return a network of one stage that does nothing."""
    stages = Stages([nn.Identity(), nn.Identity()], [name])
    stages.layouts = (layout,)
    return stages


def _spread(chain: Chain, count: int) -> list[str]:
    """Return the cuts of a chain at even shares of its stages' MACs."""
    points, macs, params = [], 0, 0
    before = chain.features[INPUT]
    for stage, name, layout in zip(chain.stages, chain.stages.names, chain.stages.layouts, strict=False):
        macs, params = macs + count_macs(stage, before.clone()), params + count_params(stage)
        before = chain.features[name]
        shape = tuple(before.shape[1:])
        points.append(CutPoint(name, shape, layout, 4 * math.prod(shape), macs, params))
        if (link := chain.links.get(name)) is not None:
            before = before.new_zeros(1, *link.target.shape)
    return spread(points, count)


def _called(furnishing: Furnishing, cuts: Sequence[str], local: Blocks, host: Blocks | None, way: Path) -> Furnishing:
    """Return what stands behind layers, under the names of the cuts that end with the same tensors.

    Raises:
        ValueError: A layer is not on the path.
    """
    owners = {LOCAL: local} if host is None else {LOCAL: local, HOST: host}

    def named(name: str) -> str:
        owner, _, layer = name.partition("/")
        found = f"{owner}/{owners[owner].layer(layer)}" if owner in owners else name
        if found not in cuts:
            raise ValueError(
                f"{name!r} is not on the path {way}, whose layers are {', '.join(cuts)}.{did_you_mean(name, cuts)}"
            )
        return found

    def keyed(values: Mapping[str, Any] | None) -> dict[str, Any]:
        return {named(name): value for name, value in (values or {}).items()}

    return dataclasses.replace(
        furnishing,
        splits=[named(name) for name in furnishing.splits],
        exits=[named(name) for name in furnishing.exits],
        bottleneck_at=keyed(furnishing.bottleneck_at),
        codec_at=keyed(furnishing.codec_at),
        inserts=keyed(furnishing.inserts),
    )


def _by_owner(names: Sequence[str]) -> dict[str, list[str]]:
    """Return layers by the network that they are named for."""
    found: dict[str, list[str]] = {LOCAL: [], HOST: []}
    for name in names:
        owner, _, layer = name.partition("/")
        if owner not in found or not layer:
            raise ValueError(
                f"{name!r} must say whose layer it is, such as {LOCAL}/{name} or {HOST}/{name}: a path has two networks"
            )
        found[owner].append(layer)
    return found


def _two(name: str, values: Any) -> tuple[Any, Any]:
    if isinstance(values, str | Tensor) or not isinstance(values, Sequence) or len(values) not in (1, 2):
        raise ValueError(f"{name} must be two, those of the local network and of the host, got {type(values).__name__}")
    return values[0], values[1] if len(values) == 2 else None
