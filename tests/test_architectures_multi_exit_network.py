from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleave.architectures import (
    CutError,
    ExitHead,
    Insert,
    StagedNetwork,
    count_macs,
    create_backbone,
    cut_points,
    entropy_codec,
    multi_exit_network,
    spread,
    staged_network,
)
from cleave.architectures.backbones.zoo import CifarResNet
from cleave.architectures.network.equilibrium import scale_gradient
from cleave.deployment import build_policy

from .tiny_networks import made_once

SAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(14, num_classes=4, in_channels=1)


def network(**settings: Any) -> StagedNetwork:
    """Exits at layer1 and layer2.0; BatchNorm's statistics are those of no data, heads and backbone random."""
    return made_once(_network, settings)


def _network(settings: dict[str, Any]) -> StagedNetwork:
    torch.manual_seed(1)
    return multi_exit_network(backbone(), SAMPLE, **{"at": ["layer1", "layer2.0"], **settings}).eval()


def images(count: int = 7, seed: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def exits(built: StagedNetwork, inputs: Tensor, name: str = "exits") -> list[Tensor]:
    return list(built.outputs(inputs, built.group(name)).values())


def heads(built: StagedNetwork) -> list[Any]:
    return [insert for cut in built.exits[:-1] for insert in built.inserts_at(cut) if insert.kind == "exit"]


def test_the_last_exit_is_the_backbone_and_shares_nothing_with_it() -> None:
    whole = backbone()
    built = multi_exit_network(whole, SAMPLE, at=["layer1"]).eval()
    torch.testing.assert_close(built(images()), whole.eval()(images()), rtol=0, atol=0)
    torch.testing.assert_close(exits(built, images())[-1], whole(images()), rtol=0, atol=0)
    ours, theirs = ({p.data_ptr() for p in module.parameters()} for module in (built, whole))
    assert not ours & theirs


def test_exits_stand_where_they_are_asked_for_in_the_order_of_execution() -> None:
    assert network(at=["layer2.0", "layer1"]).exits == ("layer1", "layer2.0", "final")
    assert network(at=None, count=3).exits[:-1] == tuple(spread(cut_points(backbone(), SAMPLE), 3))


def test_each_exit_reads_the_feature_of_its_layer() -> None:
    built, seen = network(), {}
    whole = backbone().eval()
    for name in built.exits[:-1]:
        whole.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.clone()}))
    whole(images())
    for name, head, found in zip(built.exits, heads(built), exits(built, images()), strict=False):
        torch.testing.assert_close(found, head(seen[name]), rtol=0, atol=0)
        assert torch.equal(built.outputs(images(), [f"{name}/reduced"])[f"{name}/reduced"], head.reduce(seen[name]))


def test_layers_that_work_in_place_leave_an_exits_feature_as_it_was() -> None:
    whole = create_backbone("cifar", "alexnet", num_classes=4).network
    sample = torch.randn(2, 3, 32, 32)
    points = [point.name for point in cut_points(whole, sample) if point.layout == "NCHW"]
    built = multi_exit_network(whole, sample, at=points[:4], head={"size": None, "convs": 0}).eval()
    features = built.stages.features(sample, at=points[:4])
    for head, found, point in zip(heads(built), exits(built, sample), points, strict=False):
        torch.testing.assert_close(found, head(features[point]), rtol=0, atol=0)
    built.train()
    torch.stack(exits(built, sample)).sum().backward()


@pytest.mark.parametrize(
    ("name", "at", "kwargs", "convs"),
    [
        ("vit_tiny_patch16_224", ["blocks.0", "blocks.1"], {"img_size": 32, "depth": 3}, 1),
        ("swin_tiny_patch4_window7_224", ["layers.0"], {"img_size": 32, "window_size": 2, "depths": (1, 1)}, 0),
    ],
)
def test_token_networks_take_exits_too(name: str, at: list[str], kwargs: dict[str, Any], convs: int) -> None:
    whole = create_backbone("timm", name, num_classes=4, kwargs=kwargs).network
    sample = torch.randn(2, 3, 32, 32)
    built = multi_exit_network(whole, sample, at=at, head={"convs": convs, "width": 16}).eval()
    assert [tuple(logits.shape) for logits in exits(built, sample)] == [(2, 4)] * (len(at) + 1)
    torch.testing.assert_close(built(sample), whole.eval()(sample), rtol=0, atol=0)
    assert built.exit_costs() == sorted(built.exit_costs())


def test_a_head_of_ones_own_may_stand_at_each_exit() -> None:
    class Mean(Insert):
        kind, passes, emits = "exit", False, ("logits",)

        def __init__(self, shape: tuple[int, ...], layout: str, classes: int, *, cascade: bool) -> None:
            super().__init__()
            assert (layout, classes, cascade) == ("NCHW", 4, False)
            self.linear = nn.Linear(shape[0], classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mean((2, 3)))

    built = network(head=Mean)
    found = built.outputs(images(), ["layer1", "layer1/logits"])
    assert torch.equal(found["layer1/logits"], heads(built)[0](found["layer1"]))
    assert built.exits == ("layer1", "layer2.0", "final")
    assert built.run(images(), build_policy("confidence", 0.0, exits=3)).index.tolist() == [0] * 7


# --- cascade and ensemble -------------------------------------------------------------------------------------------


def test_a_cascade_reads_the_exit_before_and_teaches_it_nothing() -> None:
    built = network(cascade=True)
    first, second = heads(built)
    assert second.classifier.in_features == first.classifier.in_features * 2 + 4
    logits = exits(built, images())
    logits[1].square().sum().backward()
    assert all(p.grad is None for p in first.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in second.parameters())
    probabilities = logits[0].softmax(1)
    vector = second.pool(second.hidden(second.reduce(built.outputs(images(), ["layer2.0"])["layer2.0"])))
    expected = second.classifier(torch.cat([vector, probabilities], 1))
    torch.testing.assert_close(logits[1], expected)


def test_an_ensemble_begins_as_the_geometric_mean_and_follows_the_papers_formula() -> None:
    built = network(ensemble=True).double()
    own = exits(built, images().double())
    p = torch.stack(own).softmax(-1)
    mean = torch.stack([p[: m + 1].prod(0) ** (1 / (m + 1)) for m in range(3)])
    torch.testing.assert_close(built.ensemble(own).exp(), mean / mean.sum(-1, keepdim=True))
    with torch.no_grad():
        built.ensemble.log_weights.normal_()
        built.ensemble.log_bias.normal_()
    w, b = built.ensemble.log_weights.exp(), built.ensemble.log_bias.exp()
    answers = exits(built, images().double(), "answers")
    for m in range(3):
        q = b[m] * torch.stack([p[i] ** w[m, i] for i in range(m + 1)]).prod(0)
        torch.testing.assert_close(answers[m].exp(), q / q.sum(-1, keepdim=True))
    assert torch.equal(built(images().double()), answers[-1])


# --- training -------------------------------------------------------------------------------------------------------


def test_gradient_equilibrium_scales_what_each_branch_sends_back() -> None:
    batch = images().double()

    def gradient(equilibrium: bool, keep: tuple[int, ...]) -> Tensor:
        built = network(gradient_equilibrium=equilibrium).double()
        logits = exits(built, batch)
        loss = sum(logits[i].square().sum() for i in keep)
        return torch.autograd.grad(loss, next(built.stages[0].parameters()))[0]

    plain = [gradient(False, (i,)) for i in range(3)]
    # Of three exits: the first sends a third, the second two thirds of a half, the last two thirds of a half.
    expected = plain[0] / 3 + plain[1] * 2 / 3 / 2 + plain[2] * 2 / 3 / 2
    torch.testing.assert_close(gradient(True, (0, 1, 2)), expected)
    assert torch.equal(scale_gradient(batch, 0.3), batch)


def test_gradient_equilibrium_stands_before_a_bottleneck_and_where_nobody_reads_an_exit_is_none() -> None:
    batch = images().double()
    split = {"split": "layer1", "bottleneck": {"channels": 4}, "codec": {"bits": 32}}

    def gradient(equilibrium: bool, names: list[str], weight: str) -> Tensor:
        built = network(gradient_equilibrium=equilibrium, **split).double()
        loss = sum(logits.square().sum() for logits in built.outputs(batch, names).values())
        return torch.autograd.grad(loss, dict(built.named_weights())[weight])[0]

    encoder, stem = "at:layer1.bottleneck.encoder.0.weight", "conv1.weight"
    both = ["layer1/logits", "logits"]
    torch.testing.assert_close(gradient(True, both, encoder), gradient(False, both, encoder))
    plain = [gradient(False, [name], stem) for name in both]
    torch.testing.assert_close(gradient(True, both, stem), plain[0] / 3 + plain[1] * 2 / 3)
    assert torch.equal(gradient(True, ["logits"], stem), plain[1])


def test_gradient_equilibrium_suits_layers_that_work_in_place() -> None:
    def gradient(inplace: bool) -> Tensor:
        torch.manual_seed(0)
        layers = [
            ("a", nn.Conv2d(1, 4, 3)),
            ("b", nn.ReLU(inplace)),
            ("c", nn.Conv2d(4, 4, 3)),
            ("d", nn.ReLU(inplace)),
        ]
        body = nn.Sequential(OrderedDict([*layers, ("flat", nn.Flatten()), ("fc", nn.Linear(4 * 4 * 4, 3))]))
        built = multi_exit_network(body, SAMPLE, at=["a", "c"], gradient_equilibrium=True)
        loss = sum(logits.square().sum() for logits in exits(built, SAMPLE))
        return torch.autograd.grad(loss, next(built.stages[0].parameters()))[0]

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_layer_called_final_takes_no_exit_by_itself() -> None:
    layers = [
        ("a", nn.Conv2d(1, 4, 3)),
        ("final", nn.Conv2d(4, 4, 3)),
        ("flat", nn.Flatten()),
        ("fc", nn.Linear(64, 3)),
    ]
    body = nn.Sequential(OrderedDict(layers))
    assert multi_exit_network(body, SAMPLE, count=1).exits == ("a", "final")
    with pytest.raises(CutError, match="split names 'final'"):
        multi_exit_network(body, SAMPLE, at=["a"], split="final")


def test_costs_count_stages_heads_and_the_policy() -> None:
    built = network(split="layer2", bottleneck={"channels": 4}, codec={"bits": 4})
    whole = backbone().eval()
    features = built.outputs(SAMPLE[:1], built.exits[:-1])
    first, second = (count_macs(head, f) for head, f in zip(heads(built), features.values(), strict=True))
    points = {point.name: point.macs for point in cut_points(whole, SAMPLE)}
    costs = built.exit_costs()
    assert costs[0] == points["layer1"] + first
    assert costs[1] == points["layer2.0"] + first + second
    link = sum(cost.macs for cost in built.costs() if cost.kind in ("encoder", "decoder"))
    assert costs[2] == count_macs(whole, SAMPLE[:1]) + first + second + link
    assert built.backbone_macs == count_macs(whole, SAMPLE[:1])
    ensemble = build_policy("ensemble", 0.5, exits=3)
    assert [a - b for a, b in zip(built.exit_costs(ensemble), costs, strict=True)] == [4, 12, 24]
    assert built.cost_shares() == [cost / costs[-1] for cost in costs]


# --- exits and a split ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "reads"), [("insert", "layer1/input"), ("none", "layer1/input"), ("replace", "layer1")]
)
def test_an_exit_at_a_split_reads_before_it_but_where_the_head_is_replaced(form: str, reads: str) -> None:
    bottleneck = None if form == "none" else {"channels": 4}
    built = network(split="layer1", form=form, bottleneck=bottleneck, codec={"bits": 3, "range": "sample"})
    found = built.outputs(images(), ["layer1/logits", reads, "layer1"])
    assert torch.equal(found["layer1/logits"], heads(built)[0](found[reads]))
    assert torch.equal(found["layer1"], found[reads]) == (form == "replace")


def test_exits_before_a_bottleneck_that_replaces_the_head_are_refused() -> None:
    with pytest.raises(CutError, match=r"the exits \(layer1\) must stand behind the split at 'layer2.0': form=replace"):
        network(split="layer2.0", form="replace")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"at": ["linear"]}, CutError, "behind the last layer"),
        ({"at": ["layer1", "layer1"]}, CutError, "names 'layer1' twice"),
        ({"at": ["final"]}, CutError, "is the last exit already"),
        ({"at": ["layr1"]}, CutError, "no layer 'layr1'.*Did you mean 'layer1'"),
        ({"at": ["layer1.0.conv1"]}, CutError, "crossed by 2 tensors"),
        ({"at": []}, ValueError, "at least one layer"),
        ({"at": "layer1"}, ValueError, r"write at=\['layer1'\]"),
        ({"at": None}, ValueError, "give either at or count"),
        ({"count": 2}, ValueError, "give either at or count"),
        ({"at": None, "count": 0}, ValueError, "^count must be a whole number of at least 1"),
        ({"at": None, "count": 99}, ValueError, "cannot be spread"),
        ({"head": {"pooling": "mean"}}, ValueError, "pooling must be one of average, max, mix"),
        ({"head": {"convs": 3}}, ValueError, "convs must be 0, 1 or 2"),
        ({"head": {"poling": "max"}}, TypeError, "poling"),
        ({"split": "layer9"}, CutError, "no layer 'layer9'"),
        ({"codec": {"bits": 4}}, ValueError, "stand at a split; give split"),
        ({"codec": entropy_codec}, ValueError, "stand at a split; give split"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        network(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ensemble": True}, "ensemble=True makes one answer of several exits; give exits or exits_count"),
        ({"exits": ["layer1"], "exits_count": 1}, "give either exits or exits_count"),
        ({"exits_count": 1.5}, "exits_count must be a whole number of at least 1, got 1.5"),
        ({"codec_at": {"layer1": {}}}, "codec_at names 'layer1', but there is no split"),
        (
            {"split": "layer2", "bottleneck_at": {"layer22": {}}},
            "bottleneck_at names 'layer22', but split is at layer2.*Did you mean 'layer2'",
        ),
    ],
)
def test_bad_settings_of_any_network_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        staged_network(backbone(), SAMPLE, **settings)


@pytest.mark.parametrize("count", [1, 2])
def test_the_draws_of_exits_do_not_depend_on_a_split(count: int) -> None:
    at = ["layer1", "layer2.0"][:count]
    plain, split = network(at=at), network(at=at, split="layer2", bottleneck={"channels": 4})
    for ours, theirs in zip(heads(plain), heads(split), strict=True):
        assert isinstance(ours, ExitHead)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
