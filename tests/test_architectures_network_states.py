from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleave.architectures import StagedNetwork, multi_exit_network, split_network, staged_network
from cleave.architectures.backbones.zoo import CifarResNet

from .tiny_networks import CODERS, CODES, FAMILIES, SAMPLE, Tiny, batch, build, family, seeded


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest) -> StagedNetwork:
    return family(request.param)


def of_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(("at:", "ensemble."))}


# --- names ----------------------------------------------------------------------------------------------------------


def test_weights_are_named_as_the_backbone_names_them(network: StagedNetwork) -> None:
    state = network.state_dict()
    own = set(Tiny().state_dict())
    found = {name.replace(".sets.2.", ".").replace(".sets.4.", ".") for name in of_backbone(state)}
    head = {name for name in own if network.replaced and name.startswith("layer1.")}
    if network.replaced and network.cuts[0] == "layer2":
        head |= {name for name in own if name.startswith("layer2.")}
    assert found == own - head
    kinds = {tuple(name.split(".")[:2]) for name in state if name.startswith("at:")}
    assert kinds <= {(f"at:{cut}", insert.kind) for cut in network.cuts for insert in network.inserts_at(cut)}
    assert {name for name, _ in network.named_weights()} <= set(state)
    assert network.learnable == {name for name, _ in network.named_weights()}


def test_a_dot_in_a_cuts_name_is_no_module() -> None:
    built = build(Tiny, SAMPLE, exits=["layer1.0", "layer2"])
    keys = {name.split(".")[0] for name in built.state_dict()}
    assert keys == {"at:layer1|0", "at:layer2", "layer1", "layer2", "layer3", "fc"}
    assert built.exits == ("layer1.0", "layer2", "final")


@pytest.mark.parametrize("cuts", [[], ["layer1"], ["layer1.0", "layer2", "layer3"]])
def test_no_further_cut_renames_a_weight(cuts: list[str]) -> None:
    first = staged_network(create(), SAMPLE, cuts=["layer2"])
    first.state_dict()["layer3.0.conv1.weight"].add_(1)
    state = first.state_dict()
    other = staged_network(create(), SAMPLE, cuts=cuts)
    assert set(other.state_dict()) == set(state) == set(create().state_dict())
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())
    torch.testing.assert_close(other.eval()(SAMPLE), first.eval()(SAMPLE), rtol=0, atol=0)
    whole = create()
    whole.load_state_dict(state)
    torch.testing.assert_close(whole.eval()(SAMPLE), first(SAMPLE), rtol=0, atol=0)


def create() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(8, num_classes=4, in_channels=1)


def test_a_state_is_loaded_inside_another_module_and_what_is_missing_has_its_public_name() -> None:
    holder = nn.ModuleDict({"network": family("insert"), "other": nn.Linear(2, 2)})
    state = holder.state_dict()
    assert "network.layer1.0.weight" in state
    assert not any("stage0" in name for name in state)
    twin = nn.ModuleDict({"network": family("insert"), "other": nn.Linear(2, 2)})
    for weight in twin.parameters():
        weight.data.zero_()
    twin.load_state_dict(state)
    assert torch.equal(twin["network"](batch()), holder["network"](batch()))
    kept = {name: value for name, value in state.items() if name != "network.layer1.0.weight"}
    missing, unexpected = twin.load_state_dict(kept | {"network.layer9": torch.zeros(1)}, strict=False)
    assert (missing, unexpected) == (["network.layer1.0.weight"], ["network.layer9"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "network.layer1.0.weight"'):
        twin.load_state_dict(kept)


class TwoCalls(nn.Module):
    """One normalisation called in two stages, and a child whose name the network uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.stages = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.stage0 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.stage0(self.norm(self.stages(self.norm(self.first(x)))).mean((2, 3)))


def test_a_layer_of_two_stages_and_children_named_as_ours_keep_their_names() -> None:
    built = staged_network(TwoCalls(), SAMPLE, cuts=["stages.0"])
    state = built.state_dict()
    assert set(state) == set(TwoCalls().state_dict())
    twin = staged_network(TwoCalls(), SAMPLE, cuts=["first", "stages"])
    twin.load_state_dict(state)
    assert torch.equal(twin.eval()(SAMPLE), built.eval()(SAMPLE))
    assert twin.stages[1].norm is not None
    assert [name for name, _ in built.named_weights()] == list(dict.fromkeys(name for name, _ in built.named_weights()))


# --- copies ---------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_are_whole(network: StagedNetwork) -> None:
    expected = network.outputs(batch(), network.emits)
    trained = seeded(copy.deepcopy(network).train(), network.emits)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301 our own bytes
        found = twin.outputs(batch(), network.emits)
        assert all(torch.equal(found[name], expected[name]) for name in network.emits)
        again = seeded(twin.train(), network.emits)
        assert all(torch.equal(again[name], trained[name]) for name in network.emits)
        assert list(twin.parts()) == list(network.parts())
        ours, theirs = ({w.data_ptr() for w in module.parameters()} for module in (network, twin))
        assert not ours & theirs
        for bottleneck in twin.bottlenecks.values():
            assert all(any(part is each for each in twin.modules()) for part in bottleneck.behind)


def test_a_state_dict_rebuilds_it(network: StagedNetwork) -> None:
    twin = copy.deepcopy(network)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    twin.load_state_dict(network.state_dict())
    expected, found = (each.eval().outputs(batch(), network.emits) for each in (network, twin))
    assert all(torch.equal(found[name], expected[name]) for name in network.emits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_is_cast_as_one(network: StagedNetwork, dtype: torch.dtype) -> None:
    twin = copy.deepcopy(network).to(dtype)
    found = twin.outputs(batch().to(dtype), network.emits)
    narrow = ("/sent", "/received", "/likelihoods", "/log_variance", "answer")  # float32 at least
    for name, value in found.items():
        assert value.isfinite().all()
        assert value.dtype == dtype or name.endswith(narrow), name
    if dtype == torch.float64:
        expected = network.outputs(batch(), ["logits"])["logits"]
        torch.testing.assert_close(found["logits"].float(), expected, rtol=1e-3, atol=2e-2)
    known = {name: found[name] for name in network.cuts} or {"logits": found["logits"]}
    again = twin.outputs(None, ["logits"], given=known)
    assert torch.equal(again["logits"], found["logits"])
    assert twin.costs() == network.costs()
    twin.train().outputs(batch().to(dtype), network.emits)


def test_autocast_serves_every_family(network: StagedNetwork) -> None:
    twin = copy.deepcopy(network).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = twin.outputs(batch(), network.emits)
        loss = sum(value.float().square().mean() for value in found.values())
    loss.backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in twin.parameters())


# --- the backbone stays ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda whole: staged_network(whole, SAMPLE, cuts=["layer1"]),
        lambda whole: split_network(whole, "layer2", SAMPLE, bottleneck=CODERS, codec=CODES),
        lambda whole: multi_exit_network(whole, SAMPLE, at=["layer2"]),
    ],
)
def test_a_network_shares_nothing_with_the_backbone_it_is_cut_from(make: Any) -> None:
    whole = create().train()
    whole.layer1.eval()
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    built = make(whole)
    assert not {w.data_ptr() for w in built.parameters()} & {w.data_ptr() for w in whole.parameters()}
    built.train()
    built(SAMPLE).sum().backward()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    assert all(w.grad is None for w in whole.parameters())
    assert not whole.layer1.training


def test_building_moves_no_generator_but_for_what_is_drawn_for_weights() -> None:
    torch.manual_seed(5)
    staged_network(Tiny(), SAMPLE, cuts=["layer1"])
    found = torch.rand(3)
    torch.manual_seed(5)
    Tiny()
    assert torch.equal(torch.rand(3), found)


def test_building_leaves_no_trace_in_statistics_and_ranges() -> None:
    settings = dict(FAMILIES["all at once"]) | {"codec": {"bits": 4}, "split": ["layer1", "layer3"]}
    built = build(Tiny, SAMPLE, **settings)
    state = built.state_dict()
    assert all(not value for name, value in state.items() if "num_batches_tracked" in name or "initialized" in name)
    for bottleneck in built.bottlenecks.values():
        assert bottleneck.quantizer.fixed_range == (0, 1)
    assert all(module.training for module in built.modules())
