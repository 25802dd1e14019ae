from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cleave.architectures import StagedNetwork, recalibrate_batchnorm

from .tiny_networks import EXITS, FAMILIES, SPLIT, batch, family, seeded


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest) -> StagedNetwork:
    return family(request.param)


def learning(network: StagedNetwork, trained: tuple[str, ...]) -> StagedNetwork:
    """A copy as it is trained: its other parts frozen, their modes included."""
    twin = copy.deepcopy(network).train()
    for part, modules in twin.parts().items():
        for module in modules:
            module.train(part in trained).requires_grad_(part in trained)
    return twin


# --- parts ----------------------------------------------------------------------------------------------------------


def test_every_weight_is_in_one_part(network: StagedNetwork) -> None:
    weights = [w for modules in network.parts().values() for module in modules for w in module.parameters()]
    assert len(weights) == len({id(w) for w in weights})
    assert {id(w) for w in weights} == {id(w) for w in network.parameters()}
    modules = [id(module) for modules in network.parts().values() for module in modules]
    assert len(modules) == len(set(modules))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("plain", ["backbone"]),
        ("exits", ["backbone", "exits/layer1", "exits/layer2"]),
        ("replace", ["encoder/layer1", "quantizer/layer1", "decoder/layer1", "tail"]),
        ("insert", ["head", "encoder/layer1", "quantizer/layer1", "decoder/layer1", "tail"]),
        ("noise", ["head", "encoder/layer1", "quantizer/layer1", "decoder/layer1", "tail", "noise/layer2"]),
        (
            "three bottlenecks",
            [
                *("head", "encoder/layer1", "quantizer/layer1", "decoder/layer1", "middle/layer1"),
                *("encoder/layer2", "quantizer/layer2", "decoder/layer2", "middle/layer2"),
                *("encoder/layer3", "quantizer/layer3", "decoder/layer3", "tail"),
            ],
        ),
    ],
)
def test_parts_stand_in_the_order_of_execution(kind: str, parts: list[str]) -> None:
    assert list(family(kind).parts()) == parts


@pytest.mark.parametrize(
    ("kind", "train", "chosen"),
    [
        ("exits", ["exits"], ("exits/layer1", "exits/layer2")),
        ("exits", ["exits/layer2", "backbone"], ("backbone", "exits/layer2")),
        ("ensemble", ["ensemble"], ("ensemble",)),
        ("insert", ["backbone"], ("head", "tail")),
        ("learned", ["bottleneck"], ("encoder/layer1", "quantizer/layer1", "decoder/layer1")),
        ("two bottlenecks", ["bottleneck/layer2"], ("encoder/layer2", "quantizer/layer2", "decoder/layer2")),
        ("two bottlenecks", ["encoder", "middle"], ("encoder/layer1", "middle/layer1", "encoder/layer2")),
        ("two bottlenecks", ["backbone"], ("head", "middle/layer1", "tail")),
        ("two bottlenecks", ["decoder/layer1"], ("decoder/layer1",)),
        ("noise", ["noise"], ("noise/layer2",)),
        ("noise", ["noise/layer2", "tail"], ("tail", "noise/layer2")),
    ],
)
def test_train_names_parts(kind: str, train: list[str], chosen: tuple[str, ...]) -> None:
    assert family(kind).resolve(train) == chosen


@pytest.mark.parametrize(
    ("kind", "train", "words"),
    [
        ("exits", ["exit"], r"train names 'exit', which this network lacks.* exits, .*Did you mean 'exits'"),
        ("exits", ["bottleneck"], "lacks: its parts are backbone, exits, exits/layer1, exits/layer2"),
        ("replace", ["head"], "'head', which this network lacks"),
        ("two bottlenecks", ["encoder/layer3"], "Did you mean 'encoder/layer[12]'"),
        ("insert", "encoder", r"got the string 'encoder'; write train=\[encoder\]"),
        ("insert", ["quantizer"], r"train=\['quantizer'\] trains nothing"),
        ("insert", [], "trains nothing"),
        ("plain", ["ensemble"], "its parts are backbone"),
    ],
)
def test_a_part_that_is_not_there_is_refused(kind: str, train: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        family(kind).resolve(train)


# --- what an output needs, and what can be stored -------------------------------------------------------------------


def test_outputs_need_the_parts_that_their_gradients_reach(network: StagedNetwork) -> None:
    twin = copy.deepcopy(network).train().requires_grad_(True)
    owners = {id(w): part for part, modules in twin.parts().items() for module in modules for w in module.parameters()}
    cascade = any(getattr(insert, "cascade", False) for cut in twin.cuts for insert in twin.inserts_at(cut))
    for name in network.emits:
        twin.zero_grad(set_to_none=True)
        value = seeded(twin, [name])[name]
        if value.requires_grad:
            value.sum().backward()
        reached = {owners[id(w)] for w in twin.parameters() if w.grad is not None}
        needed = {part for part in network.needed([name]) if part in owners.values()}
        # An exit of a cascade reads the one before, but teaches it nothing.
        taught_nothing = {part for part in needed if part.startswith("exits/")} if cascade else set()
        # What an insert computes all at once depends on all that it reads, as far as the network knows.
        assert name.endswith("/level") or needed - taught_nothing <= reached, name
        assert reached <= needed, name


def test_what_is_given_spares_parts() -> None:
    built = family("all at once")
    assert built.needed(["layer1/logits"]) == {"head", "exits/layer1"}
    assert built.needed(["logits"], given=["layer2/input"]) == {"noise/layer2", "tail"}
    assert built.needed(built.group("exits"), given=["logits", "layer1/reduced", "layer2/reduced"]) == {
        "exits/layer1",
        "exits/layer2",
    }
    assert built.needed(["layer1/likelihoods"]) == {"head", "encoder/layer1", "quantizer/layer1"}
    assert built.needed(["layer1/sent"]) == {"head", "encoder/layer1"}  # of noise the prior learns nothing


@torch.no_grad()
def test_what_frozen_parts_give_is_stored_once_and_for_all(network: StagedNetwork) -> None:
    names = [name for name in network.emits if not name.startswith("layer1/:")]
    for part in network.parts():
        stored = network.frontier(names, [part])
        twin = learning(network, (part,))
        keep = [name for name in stored if name != "images"]
        first = twin.outputs(batch(), keep)
        inputs = batch() if "images" in stored else None
        expected = seeded(copy.deepcopy(twin), names)
        found = seeded(twin, names, inputs=inputs, given=first)
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=f"{part}: {name}")
        for weight in (w for module in twin.parts()[part] for w in module.parameters()):
            weight.add_(1)
        later = twin.outputs(batch(), keep)
        assert all(torch.equal(later[name], first[name]) for name in keep), part


@pytest.mark.parametrize(
    ("kind", "names", "train", "stored"),
    [
        ("exits", ["layer1/logits", "layer2/logits"], ["exits"], ("layer1/reduced", "layer2/reduced")),
        ("exits", ["layer1/logits", "logits"], ["exits"], ("layer1/reduced", "logits")),
        ("exits", ["logits"], ["backbone"], ("images",)),
        ("insert", ["layer1", "layer1/input"], ["bottleneck"], ("layer1/input",)),
        ("replace", ["layer1"], ["encoder"], ("images",)),
        ("insert", ["logits"], ["tail"], ("layer1",)),
        ("insert", ["logits"], ["decoder"], ("layer1/received",)),
        ("lossy", ["logits"], ["decoder"], ("layer1/sent",)),  # every packet may be another one that is lost
        ("lossy", ["layer1/logits"], ["exits"], ("layer1/reduced",)),
        ("prior", ["logits", "layer1/likelihoods"], ["quantizer"], ("layer1/z",)),
        ("prior", ["logits"], ["tail"], ("layer1",)),
        ("stochastic", ["logits"], ["decoder"], ("layer1/received",)),
        ("noise", ["logits"], ["tail"], ("layer1",)),
        ("two bottlenecks", ["layer2"], ["bottleneck/layer2"], ("layer2/input",)),
    ],
)  # fmt: skip
def test_the_frontier_lies_before_what_learns_or_draws(
    kind: str, names: list[str], train: list[str], stored: tuple[str, ...]
) -> None:
    built = family(kind, **({"exits": ["layer1"]} if kind == "lossy" else {}))
    trained = [part for part in built.parts() if part in train or part.split("/")[0] in train]
    trained += [part for part in built.resolve(train) if part not in trained] if train == ["bottleneck/layer2"] else []
    trained += ["encoder/layer1", "quantizer/layer1", "decoder/layer1"] if train == ["bottleneck"] else []
    assert built.frontier(names, trained) == stored


def test_another_link_changes_what_can_be_stored() -> None:
    lossy, clean = family("lossy"), family("insert")
    clean.set_channel(lossy.bottlenecks["layer1"].channel)
    assert clean.frontier(["logits"], ["decoder/layer1"]) == ("layer1/sent",)
    lossy.set_channel(None)
    assert lossy.frontier(["logits"], ["decoder/layer1"]) == ("layer1/received",)


# --- costs ----------------------------------------------------------------------------------------------------------


def test_costs_add_up_to_all_that_runs(network: StagedNetwork) -> None:
    costs = network.costs()
    assert len({(cost.name, cost.kind) for cost in costs}) == len(costs)
    names = [cost.name for cost in costs]
    order = [*network.cuts, "final"]
    assert [order.index(name) for name in names] == sorted(order.index(name) for name in names)
    assert sum(cost.params for cost in costs) == sum(
        w.numel()
        for part, modules in network.parts().items()
        for module in modules
        if part != "ensemble" and not part.startswith("quantizer/")
        for name, w in module.named_parameters()
        if "log_variance" not in name
    )
    assert network.exit_costs()[-1] == sum(cost.macs for cost in costs)
    assert network.exit_costs() == sorted(network.exit_costs())
    assert len(network.exit_costs()) == max(1, len(network.exits))
    assert network.cost_shares()[-1] == 1
    assert network.backbone_macs == family("plain").backbone_macs
    kinds = [cost.kind for cost in costs]
    assert kinds.count("encoder") == kinds.count("decoder") == len(network.bottlenecks)
    assert kinds.count("exit") == max(0, len(network.exits) - 1)


def test_costs_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = family("exits, inserted")
    first = built.costs()
    monkeypatch.setattr(built, "compute", lambda *_: pytest.fail("the network ran"))
    assert built.costs() == first
    assert built.costs() is not first


# --- widths ---------------------------------------------------------------------------------------------------------


def widened(module: nn.Module) -> bool:
    return any(".sets." in f".{name}" for name in module.state_dict())


def test_a_bottleneck_of_several_widths_owns_the_batchnorm_behind_it_up_to_the_next() -> None:
    built = family("three and exits")
    (first, second, third), stages = built.bottlenecks.values(), built.stages
    exits = {cut: insert for cut in built.cuts for insert in built.inserts_at(cut) if insert.kind == "exit"}
    assert [widened(m) for m in (first.encoder, first.decoder, exits["layer1"])] == [False, True, True]
    assert [widened(m) for m in (exits["layer2"], second.encoder, second.decoder)] == [True, True, False]
    assert [widened(m) for m in (third.encoder, third.decoder, stages[2], stages[3])] == [False] * 4
    built = family("exits and widths")  # an exit at an inserted bottleneck reads before it
    exits = {cut: insert for cut in built.cuts for insert in built.inserts_at(cut) if insert.kind == "exit"}
    assert [widened(m) for m in (built.stages[0], exits["layer1"])] == [False, False]
    assert [widened(m) for m in (built.stages[2], exits["layer2"])] == [True, True]
    assert built.widths == {"layer1": (2, 4)}


@pytest.mark.parametrize("kind", ["widths", "exits and widths", "three and exits"])
def test_all_that_stands_behind_runs_at_the_width_in_use(kind: str) -> None:
    built = family(kind).train()
    for bits, times in ((2, 3), (4, 5)):
        built.set_bits(bits, at="layer1")
        for _ in range(times):
            built.outputs(batch(), built.emits)
    counts = {name: int(v) for name, v in built.state_dict().items() if ".sets." in name and "num_batches" in name}
    assert counts
    assert all(count == (1 + (3 if ".sets.2." in name else 5)) for name, count in counts.items())
    built.eval()
    found = {}
    for bits in (2, 4, 2):
        built.set_bits(bits, at="layer1")
        now = built.outputs(batch(), ["layer1"])["layer1"]
        assert torch.equal(now, found.setdefault(bits, now))
    assert not torch.equal(found[2], found[4])


def test_what_was_decoded_before_runs_on_at_the_width_that_is_set() -> None:
    built = family("widths")
    known = {}
    for bits in (2, 4):
        built.set_bits(bits)
        known[bits] = built.outputs(batch(), ["layer1", "logits"])
    for bits in (2, 4):
        built.set_bits(bits)
        again = built.outputs(None, ["logits"], given={"layer1": known[bits]["layer1"]})
        assert torch.equal(again["logits"], known[bits]["logits"])


def test_bits_belong_to_one_bottleneck_or_to_all() -> None:
    built = family("two bottlenecks")
    assert [built.bits(), built.bits("layer1"), built.bits("layer2")] == [4, 4, 4]
    built.set_bits(3, at="layer2")
    assert [built.bits("layer1"), built.bits("layer2")] == [4, 3]
    built.set_bits(2)
    assert [built.bits("layer1"), built.bits("layer2")] == [2, 2]
    assert family("plain").bits() is None
    assert family("prior").bits() is None
    for words, call in (
        ("no bottleneck at 'layer3'; there are some at layer1, layer2", lambda: built.set_bits(2, at="layer3")),
        ("no bottleneck at 'layer'", lambda: built.bits("layer")),
        ("bits=4 has no meaning: this network is not split", lambda: family("exits").set_bits(4)),
        ("a channel has no meaning: this network is not split", lambda: family("exits").set_channel(_channel())),
        ("a range has no meaning: this network is not split", lambda: family("exits").calibrate([], "layer1", 4)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    family("exits").set_channel(None)


def _channel() -> Any:
    return family("lossy").bottlenecks["layer1"].channel


def test_statistics_of_a_decoder_are_measured_through_the_network() -> None:
    built = family("exits, inserted")
    decoder = built.bottlenecks["layer1"].decoder
    before = {name: value.clone() for name, value in built.state_dict().items()}
    assert recalibrate_batchnorm(built, decoder, [batch(8, seed) for seed in range(3)]) == 2
    moved = {name for name, value in built.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("at:layer1.bottleneck.decoder.") for name in moved)


@pytest.mark.parametrize("kind", [*EXITS, *SPLIT])
def test_what_is_compiled_is_called_by_itself(kind: str) -> None:
    built = family(kind).train()
    ran = set()
    leaves = built.leaves()
    assert not any(part in leaves for insert in _inserts(built) for part in [insert] if insert.kind != "noise")
    for leaf in leaves:
        leaf.register_forward_hook(lambda module, *_: ran.add(module))
    built.outputs(batch(), built.emits)
    identity = {built.stages[0]} if built.replaced else set()
    assert ran == set(leaves) - identity


def _inserts(built: StagedNetwork) -> list[Any]:
    return [insert for cut in built.cuts for insert in built.inserts_at(cut)]
