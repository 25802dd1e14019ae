from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleave.architectures import StagedNetwork, entropy_codec, split_network, staged_network
from cleave.architectures.partitions import Partitions, network_partitions
from cleave.deployment import (
    ENVELOPE_BYTES,
    EntropyCodec,
    FloatCodec,
    ImageInput,
    OutputSpec,
    Pipeline,
    TensorInput,
    Transfer,
    UniformCodec,
    build_policy,
    check_parts,
    export_bundle,
    offline,
)

from .tiny_networks import CODERS, CODES, FAMILIES, SAMPLE, Tiny, family

INPUT = ImageInput(height=8, width=8, color_mode="L", mean=(0.4,), std=(0.3,), resize=8)
LOGITS = (OutputSpec("logits", "logits", (4,), ("ant", "bee", "cat", "dog")),)
TIERS = ["device", "edge", "cloud"]
EXITS = {"exits": ["layer1", "layer2"], "exit_head": {"grid": 2, "width": 4}}
SPLIT = {"form": "insert", "bottleneck": CODERS, "codec": CODES}


def tiny(**settings: Any) -> StagedNetwork:
    torch.manual_seed(0)
    return staged_network(Tiny(), SAMPLE, **settings).eval()


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def settings_of(parts: Partitions) -> dict[str, Tensor]:
    """What each side supplies."""
    transfers = [transfer for edge in parts.edges for transfer in edge.transfers if transfer.codec is not None]
    return {name: value for each in transfers for name, value in each.codec.settings_of(each.tensor).items()}


@torch.no_grad()
def through(parts: Partitions, batch: Tensor, name: str = "images") -> dict[str, Tensor]:
    """All tensors of the way through the partitions, in bytes between placements; no input is altered."""
    known = settings_of(parts) | {name: batch}
    for part in parts.parts:
        arguments = [known[name] for name in part.inputs]
        kept = [tensor.clone() for tensor in arguments]
        result = part.module.eval()(*arguments)
        assert all(torch.equal(*pair) for pair in zip(arguments, kept, strict=True))
        known |= dict(zip(part.outputs, result if isinstance(result, tuple) else (result,), strict=True))
        for transfer in (each for edge in parts.edges if edge.producer == part.name for each in edge.transfers):
            if transfer.codec is not None:
                sent = {own: known[name] for own, name in transfer.sent.items()}
                delivered = transfer.codec.decode(transfer.codec.encode(sent))
                known |= {transfer.delivered[own]: value for own, value in delivered.items()}
    return known


def coded(at: str, codec: Any, tensors: dict[str, Tensor]) -> Any:
    return codec.decode(codec.encode(tensors))


# --- every family ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest) -> StagedNetwork:
    return family(request.param)


def test_partitions_through_bytes_are_the_network_and_leave_their_inputs_alone(network: StagedNetwork) -> None:
    parts, batch = network_partitions(network, INPUT), images(5, seed=3)
    names = network.group("exits") if network.exits else ("logits",)
    route = check_parts(parts.parts, parts.edges, input=INPUT, outputs=LOGITS, exits=parts.exits)
    assert route.order == tuple(part.name for part in parts.parts)
    widths = [None] if not network.widths else [2, 4]
    for bits in widths:
        if bits is not None:
            network.set_bits(bits, at=next(iter(network.widths)))
            parts = network_partitions(network, INPUT)
        with torch.no_grad():
            expected = network.outputs(INPUT.normalize(batch), names, link=coded if network.bottlenecks else None)
        found = through(parts, batch)
        close = {"rtol": 1e-6, "atol": 1e-6} if network.widths else {"rtol": 0, "atol": 0}
        for name in names:
            torch.testing.assert_close(found[name], expected[name], **close)


def test_partitions_share_the_networks_weights(network: StagedNetwork) -> None:
    own = {id(weight) for weight in network.parameters()}
    parts = network_partitions(network, INPUT)
    assert {id(weight) for part in parts.parts for weight in part.module.parameters()} <= own


@pytest.mark.parametrize("kind", ["confidence", "ensemble"])
def test_costs_are_those_of_all_that_runs(network: StagedNetwork, kind: str) -> None:
    if not network.exits:
        parts = network_partitions(network, INPUT)
        assert parts.exits == []
        assert sum(part.macs for part in parts.parts) == network.exit_costs()[-1]
        return
    policy = build_policy(kind, 0.5, exits=len(network.exits))
    parts = network_partitions(network, INPUT, policy=policy, accuracies={"layer1": 0.25})
    assert [spec.name for spec in parts.exits] == list(network.exits)
    assert [spec.partition for spec in parts.exits] == [f"to_{name}" for name in network.exits]
    assert [spec.accuracy for spec in parts.exits] == [0.25, *[None] * (len(parts.exits) - 1)]
    assert sum(part.macs for part in parts.parts) == network.exit_costs()[-1]
    expected = dict(zip(network.exits, network.exit_costs(policy), strict=True))
    for cost in network.costs():
        if cost.kind == "encoder" and cost.name in expected and not (network.replaced and cost.name == network.cuts[0]):
            expected[cost.name] += cost.macs  # beside the exit, in the same partition
    assert [spec.macs for spec in parts.exits] == list(expected.values())


# --- names, placements and edges ------------------------------------------------------------------------------------


def test_a_partition_ends_at_each_exit_and_at_the_split() -> None:
    parts = network_partitions(tiny(**EXITS, **SPLIT, split="layer2", cascade=True), INPUT)
    assert [(part.name, part.placement) for part in parts.parts] == [
        ("to_layer1", "device"),
        ("to_layer2", "device"),
        ("to_final", "server"),
    ]
    codes = ("layer2.codes", "layer2.low", "layer2.high")
    assert [part.inputs for part in parts.parts] == [
        ("images",),
        ("layer1/input", "layer1/logits", "layer2.levels"),
        (*codes, "layer2.levels"),
    ]
    assert [part.outputs for part in parts.parts] == [
        ("layer1/input", "layer1/logits"),
        ("layer2/logits", *codes),
        ("logits",),
    ]
    first, second = parts.edges
    assert (first.producer, first.consumer) == ("to_layer1", "to_layer2")
    assert first.transfers == (Transfer("layer1/input"), Transfer("layer1/logits"))
    assert (second.producer, second.consumer) == ("to_layer2", "to_final")
    (transfer,) = second.transfers
    assert transfer.tensor == "layer2"
    assert isinstance(transfer.codec, UniformCodec)
    assert (transfer.codec.bits, transfer.codec.shape) == (4, (3, 4, 4))


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({}, ["device"]),
        (EXITS, ["device", "device", "device"]),
        (SPLIT | {"split": "layer1"}, ["device", "server"]),
        (EXITS | SPLIT | {"split": "layer1"}, ["device", "server", "server"]),
        (EXITS | SPLIT | {"split": "layer2", "exits": ["layer1"]}, ["device", "device", "server"]),
        (SPLIT | {"split": ["layer1", "layer2"]}, ["device", "edge", "server"]),
        (SPLIT | {"split": ["layer1", "layer2", "layer3"]}, ["device", "edge1", "edge2", "server"]),
    ],
)
def test_partitions_run_where_something_is_sent_from_and_to(settings: dict[str, Any], places: list[str]) -> None:
    assert [part.placement for part in network_partitions(tiny(**settings), INPUT).parts] == places


def test_a_partition_is_named_for_its_placement_where_it_is_alone_there() -> None:
    def names(placements: list[str] | None = None, **settings: Any) -> list[str]:
        return [part.name for part in network_partitions(tiny(**settings), INPUT, placements).parts]

    assert names() == ["whole"]
    assert names(**SPLIT, split="layer1") == ["device", "server"]
    assert names(["phone", "cloud"], **SPLIT, split="layer1") == ["phone", "cloud"]
    assert names(["a", "b", "a"], **SPLIT, split=["layer1", "layer2"]) == ["to_layer1", "to_layer2", "to_final"]
    assert names(TIERS, **EXITS) == ["to_layer1", "to_layer2", "to_final"]


def test_an_exit_where_the_head_is_replaced_stands_on_the_server() -> None:
    parts = network_partitions(tiny(**EXITS | SPLIT | {"form": "replace"}, split="layer1"), INPUT)
    assert [(part.name, part.placement) for part in parts.parts] == [
        ("to_layer1_sent", "device"),
        ("to_layer1", "server"),
        ("to_layer2", "server"),
        ("to_final", "server"),
    ]
    assert parts.parts[1].outputs == ("layer1/:bottleneck", "layer1/logits")


def test_what_passes_between_placements_without_a_bottleneck_is_sent_as_float() -> None:
    parts = network_partitions(tiny(**EXITS, cascade=True), INPUT, TIERS)
    first, second = parts.edges
    assert first.transfers == (
        Transfer("layer1/input", FloatCodec((8, 8, 8))),
        Transfer("layer1/logits", FloatCodec((4,))),
    )
    assert second.transfers == (Transfer("layer2/input", FloatCodec((8, 4, 4))),)


def test_an_edge_may_skip_a_partition() -> None:
    network = tiny(**EXITS | SPLIT | {"exits": ["layer1", "layer3"]}, split="layer2", cascade=True)
    parts = network_partitions(network, INPUT)
    assert [(edge.producer, edge.consumer, [t.tensor for t in edge.transfers]) for edge in parts.edges] == [
        ("to_layer1", "to_layer2", ["layer1/input"]),
        ("to_layer1", "to_layer3", ["layer1/logits"]),
        ("to_layer2", "to_layer3", ["layer2"]),
        ("to_layer3", "to_final", ["layer3/input"]),
    ]
    assert parts.edges[1].transfers[0].codec == FloatCodec((4,))


def test_several_bottlenecks_each_have_their_codec() -> None:
    network = family("three bottlenecks")
    parts = network_partitions(network, INPUT)
    codecs = {t.tensor: t.codec for edge in parts.edges for t in edge.transfers}
    assert list(codecs) == ["layer1", "layer2", "layer3"]
    assert isinstance(codecs["layer2"], EntropyCodec)
    # What reads codes of several widths takes their number, up to the next quantiser.
    assert [[name for name in part.inputs if name.endswith(".levels")] for part in parts.parts] == [
        ["layer1.levels"],
        ["layer1.levels"],
        ["layer3.levels"],
        ["layer3.levels"],
    ]
    network = family("exits and widths")
    parts = network_partitions(network, INPUT)
    assert [part.inputs[-1] for part in parts.parts] == ["layer1.levels"] * 3


@pytest.mark.parametrize(
    ("settings", "placements", "words"),
    [
        (EXITS, ["device", "server"], "2 names, but there are 3 partitions, which end at layer1, layer2, final"),
        (EXITS, "device", r"write placements=\[device,server\]"),
        (EXITS, ["device", "", "server"], "are a list of names"),
        (
            EXITS | SPLIT | {"split": "layer2"},
            ["device", "server", "server"],
            "to layer2 and to final both on server: nothing is sent at the split layer2",
        ),
        ({}, TIERS, "3 names, but there are 1 partitions"),
    ],
)
def test_placements_that_do_not_fit_are_refused(settings: dict[str, Any], placements: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network_partitions(tiny(**settings), INPUT, placements)


# --- other inputs and results ---------------------------------------------------------------------------------------


def test_token_ids_and_maps_need_no_normalisation() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    tokens = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
    network = split_network(whole, "1", tokens, form="insert", bottleneck={"channels": 4}, codec=CODES).eval()
    spec = TensorInput(shape=(6,), dtype="int64", name="tokens")
    parts = network_partitions(network, spec)
    assert [part.inputs[0] for part in parts.parts] == ["tokens", "1.codes"]
    outputs = (OutputSpec("logits", "tokens", (6, 3)),)
    check_parts(parts.parts, parts.edges, input=spec, outputs=outputs)
    found = through(parts, tokens, "tokens")["logits"]
    with torch.no_grad():
        assert torch.equal(found, network.outputs(tokens, ["logits"], link=coded)["logits"])
    assert network_partitions(network).parts[0].inputs[0] == "images"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return {"one": self.one(x), "two": self.two(x).mean((2, 3))}


def test_several_results_are_outputs_of_the_last_partition() -> None:
    torch.manual_seed(0)
    network = split_network(Two(), "body", SAMPLE, form="insert", bottleneck=CODERS, codec=CODES).eval()
    parts = network_partitions(network, INPUT)
    assert parts.parts[-1].outputs == ("output/one", "output/two")
    found = through(parts, images())
    with torch.no_grad():
        expected = network.outputs(INPUT.normalize(images()), network.results, link=coded)
    assert all(torch.equal(found[name], expected[name]) for name in network.results)


# --- bundles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "float",
        "prior",
        "stochastic",
        "noise where the head is replaced",
        "exits, replaced",
        "exits around a split",
        "all at once",
        "exits and widths",
        "three and exits",
    ],
)
def test_a_bundle_of_any_family_answers_as_the_network(kind: str, tmp_path: Path) -> None:
    network = family(kind)
    policy, names = None, network.group("exits") if network.exits else ("logits",)
    batch = images(12, seed=7)
    with torch.no_grad():
        link = coded if network.bottlenecks else None
        own = torch.stack(list(network.outputs(INPUT.normalize(batch), names, link=link).values()))
    if network.exits:
        never = build_policy("confidence", None, exits=len(network.exits))
        policy = never.with_thresholds([float(row.median()) - 1e-4 for row in never.scores(own)[:-1]])
    parts = network_partitions(network, INPUT, policy=policy)
    more = {"exits": parts.exits, "policy": policy}
    bundle = export_bundle(
        tmp_path / "bundle", parts.parts, parts.edges, input=INPUT, outputs=LOGITS, images=images(), **more
    )
    bundle.self_test()
    result = Pipeline(bundle).run(batch)
    if policy is None:
        torch.testing.assert_close(result.logits, own[0], rtol=1e-5, atol=1e-5)
    else:
        expected = offline(policy, own)
        assert torch.equal(result.exits, expected.index)
        assert len(set(result.exits.tolist())) > 1
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert set(result.payloads) >= set(network.bottlenecks)


def test_another_width_is_chosen_at_run_time(tmp_path: Path) -> None:
    network = family("exits and widths")
    parts = network_partitions(network, INPUT)
    more = {"input": INPUT, "outputs": LOGITS, "images": images(), "exits": parts.exits}
    bundle = export_bundle(tmp_path / "bundle", parts.parts, parts.edges, **more)
    batch = images(9, seed=4)
    for bits in (2, 4):
        network.set_bits(bits)
        with torch.no_grad():
            expected = network.outputs(INPUT.normalize(batch), ["logits"], link=coded)["logits"]
        result = Pipeline(bundle, bits=bits).run(batch)
        torch.testing.assert_close(result.logits, expected, rtol=1e-5, atol=1e-5)
        assert set(result.payload_bytes) == {ENVELOPE_BYTES + 3 * 64 * bits // 8 + 8}


def test_entropy_coded_tokens_pass_too() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    sample = torch.randn(4, 6, 5)
    network = split_network(whole, "0", sample, form="insert", bottleneck={"channels": 4}, codec=entropy_codec).eval()
    parts = network_partitions(network, TensorInput(shape=(6, 5), name="x"))
    with torch.no_grad():
        assert torch.equal(through(parts, sample, "x")["logits"], network(sample))
