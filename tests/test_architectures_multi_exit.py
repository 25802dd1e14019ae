from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleave.architectures import CutError, ExitHead, MultiExitNetwork, count_macs, create_backbone, cut_points, spread
from cleave.architectures.multi_exit import scale_gradient
from cleave.deployment import build_policy, offline

SAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def backbone(name: str = "resnet20", channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone("cifar", name, num_classes=4, in_channels=channels).network


def network(**settings: Any) -> MultiExitNetwork:
    """Exits at layer1 and layer2.1; BatchNorm's statistics are those of no data, heads and backbone random."""
    torch.manual_seed(1)
    return MultiExitNetwork(backbone(), SAMPLE, **{"at": ["layer1", "layer2.1"], **settings}).eval()


def images(count: int = 7, seed: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_last_exit_is_the_backbone_and_shares_nothing_with_it() -> None:
    whole = backbone()
    built = MultiExitNetwork(whole, SAMPLE, at=["layer1"]).eval()
    torch.testing.assert_close(built(images()), whole.eval()(images()), rtol=0, atol=0)
    torch.testing.assert_close(built.exits(images())[-1], whole(images()), rtol=0, atol=0)
    ours, theirs = ({p.data_ptr() for p in module.parameters()} for module in (built, whole))
    assert not ours & theirs


def test_exits_stand_where_they_are_asked_for_in_the_order_of_execution() -> None:
    assert network(at=["layer2.1", "layer1"]).exit_names == ("layer1", "layer2.1", "final")
    assert network(at=None, count=3).exit_names[:-1] == tuple(spread(cut_points(backbone(), SAMPLE), 3))


def test_each_exit_reads_the_feature_of_its_layer() -> None:
    built, seen = network(), {}
    whole = backbone().eval()
    for name in built.exit_names[:-1]:
        whole.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.clone()}))
    whole(images())
    for name, head, found in zip(built.exit_names, built.heads, built.exits(images()), strict=False):
        torch.testing.assert_close(found, head(seen[name]), rtol=0, atol=0)


def test_layers_that_work_in_place_leave_an_exits_feature_as_it_was() -> None:
    whole = create_backbone("cifar", "alexnet", num_classes=4).network
    sample = torch.randn(2, 3, 32, 32)
    points = [point.name for point in cut_points(whole, sample) if point.layout == "NCHW"]
    built = MultiExitNetwork(whole, sample, at=points[:4], heads={"size": None, "convs": 0}).eval()
    features = built.stages.features(sample, at=points[:4])
    for head, found, point in zip(built.heads, built.exits(sample), points, strict=False):
        torch.testing.assert_close(found, head(features[point]), rtol=0, atol=0)
    built.train()
    torch.stack(built.exits(sample)).sum().backward()


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
    built = MultiExitNetwork(whole, sample, at=at, heads={"convs": convs, "width": 16}).eval()
    assert [tuple(logits.shape) for logits in built.exits(sample)] == [(2, 4)] * (len(at) + 1)
    torch.testing.assert_close(built(sample), whole.eval()(sample), rtol=0, atol=0)
    assert built.exit_costs() == sorted(built.exit_costs())


# --- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["average", "max", "mix"])
def test_a_head_pools_as_it_says(pooling: str) -> None:
    head = ExitHead((3, 4, 4), "NCHW", classes=5, pooling=pooling, grid=2, size=None, convs=0).eval()
    x = torch.randn(6, 3, 4, 4)
    cells = x.reshape(6, 3, 2, 2, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(6, 3, 2, 2, 4)
    average, maximum = cells.mean(-1).flatten(1), cells.amax(-1).flatten(1)
    expected = {"average": average, "max": maximum, "mix": 0.25 * maximum + 0.75 * average}[pooling]
    if pooling == "mix":
        head.pool.mix.data = torch.tensor(1 / 3).log()  # a sigmoid of 1/4
    torch.testing.assert_close(head(x), expected @ head.classifier.weight.T + head.classifier.bias)


def test_large_maps_are_averaged_down_before_anything_is_learned() -> None:
    head = ExitHead((3, 16, 16), "NCHW", classes=5, size=4, convs=2, width=7)
    assert head.reduce(torch.randn(2, 3, 16, 16)).shape == (2, 3, 4, 4)
    assert not list(head.reduce.parameters())
    assert head.hidden[0].weight.shape == (7, 3, 3, 3)
    assert head.hidden[3].weight.shape == (7, 7, 3, 3)


def test_a_cascade_reads_the_exit_before_and_teaches_it_nothing() -> None:
    built = network(cascade=True)
    first, second = built.heads
    assert second.classifier.in_features == first.classifier.in_features * 2 + 4
    logits = built.exits(images())
    logits[1].square().sum().backward()
    assert all(p.grad is None for p in first.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in second.parameters())
    probabilities = logits[0].softmax(1)
    vector = second.pool(second.hidden(second.reduce(built.stages.features(images(), ["layer2.1"])["layer2.1"])))
    expected = second.classifier(torch.cat([vector, probabilities], 1))
    torch.testing.assert_close(logits[1], expected)


def test_an_ensemble_begins_as_the_geometric_mean_and_follows_the_papers_formula() -> None:
    built = network(ensemble=True).double()
    own = built.classify(built.reduced(images().double()))
    p = torch.stack(own).softmax(-1)
    mean = torch.stack([p[: m + 1].prod(0) ** (1 / (m + 1)) for m in range(3)])
    torch.testing.assert_close(built.ensemble(own).exp(), mean / mean.sum(-1, keepdim=True))
    with torch.no_grad():
        built.ensemble.log_weights.normal_()
        built.ensemble.log_bias.normal_()
    w, b = built.ensemble.log_weights.exp(), built.ensemble.log_bias.exp()
    for m in range(3):
        q = b[m] * torch.stack([p[i] ** w[m, i] for i in range(m + 1)]).prod(0)
        torch.testing.assert_close(built.exits(images().double())[m].exp(), q / q.sum(-1, keepdim=True))


# --- stopping early -------------------------------------------------------------------------------------------------


def policies(exits: int, classes: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(exits, exits, generator=generator).tril().add(0.1).tolist()
    return [
        build_policy("confidence", [0.3, 0.28], exits=exits),
        build_policy("entropy", 0.99, exits=exits),
        build_policy("margin", [None, 0.02], exits=exits),
        build_policy("patience", 1, exits=exits),
        build_policy("ensemble", 0.28, exits=exits, weights=weights),
        build_policy("confidence", 0.0, exits=exits),
        build_policy("confidence", None, exits=exits),
    ]


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("count", [1, 13])
def test_dynamic_inference_equals_offline_evaluation_and_really_stops(number: int, cascade: bool, count: int) -> None:
    built = network(cascade=cascade, split="layer2", codec={"bits": 4, "range": "sample"}).double()
    policy = policies(3, 4)[number]
    batch, sizes = images(count).double(), []
    with torch.no_grad():
        expected = offline(policy, torch.stack(built.classify(built.reduced(batch))))
        for stage in built.stages:
            stage.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        found = built.run(batch, policy)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    left_behind = [count, *(int((expected.index > i).sum()) for i in range(2))]
    # A stage for each cut: layer1, layer2.1, layer2 (the split, which has no exit), and the rest.
    called = [left_behind[0], left_behind[1], left_behind[2], left_behind[2]]
    assert sizes == [size for size in called if size]


# --- training -------------------------------------------------------------------------------------------------------


def test_gradient_equilibrium_scales_what_each_branch_sends_back() -> None:
    built = network().double()
    batch = images().double()

    def gradient(equilibrium: bool, keep: tuple[int, ...]) -> Tensor:
        logits = built.classify(built.reduced(batch, equilibrium=equilibrium))
        loss = sum(logits[i].square().sum() for i in keep)
        return torch.autograd.grad(loss, next(built.stages[0].parameters()))[0]

    plain = [gradient(False, (i,)) for i in range(3)]
    # Of three exits: the first sends a third, the second two thirds of a half, the last two thirds of a half.
    expected = plain[0] / 3 + plain[1] * 2 / 3 / 2 + plain[2] * 2 / 3 / 2
    torch.testing.assert_close(gradient(True, (0, 1, 2)), expected)
    assert torch.equal(scale_gradient(batch, 0.3), batch)


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
        built = MultiExitNetwork(body, SAMPLE, at=["a", "c"])
        loss = sum(logits.square().sum() for logits in built.classify(built.reduced(SAMPLE, equilibrium=True)))
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
    assert MultiExitNetwork(body, SAMPLE, count=1).exit_names == ("a", "final")
    with pytest.raises(CutError, match=r"split.at names 'final'"):
        MultiExitNetwork(body, SAMPLE, at=["a"], split="final")


def test_a_policy_of_other_exits_is_refused_however_early_all_leave() -> None:
    with pytest.raises(ValueError, match="the policy has 2 exits, the network 3"):
        network().run(images(), build_policy("confidence", 0.0, exits=2))


def test_costs_count_stages_heads_and_the_policy() -> None:
    built = network(split="layer2", bottleneck={"channels": 4}, codec={"bits": 4})
    whole = backbone().eval()
    first, second = (count_macs(head.cpu(), f) for head, f in zip(built.heads, _features(built), strict=True))
    points = {point.name: point.macs for point in cut_points(whole, SAMPLE)}
    costs = built.exit_costs()
    assert costs[0] == points["layer1"] + first
    assert costs[1] == points["layer2.1"] + first + second
    link = sum(built.profile()[part]["macs"] for part in ("encoder", "decoder"))
    assert costs[2] == count_macs(whole, SAMPLE[:1]) + first + second + link
    assert built.backbone_macs == count_macs(whole, SAMPLE[:1])
    ensemble = build_policy("ensemble", 0.5, exits=3)
    assert [a - b for a, b in zip(built.exit_costs(ensemble), costs, strict=True)] == [4, 12, 24]
    assert built.cost_shares() == [cost / costs[-1] for cost in costs]


def _features(built: MultiExitNetwork) -> list[Tensor]:
    return list(built.stages.features(SAMPLE[:1], at=built.exit_names[:-1]).values())


def test_a_copy_and_a_state_dict_rebuild_it() -> None:
    built = network(cascade=True, ensemble=True)
    twin = network(cascade=True, ensemble=True)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(built.state_dict())
    for other in (twin, copy.deepcopy(built)):
        torch.testing.assert_close(torch.stack(other.exits(images())), torch.stack(built.exits(images())))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"at": ["linear"]}, CutError, "behind the last layer"),
        ({"at": ["layer1", "layer1"]}, CutError, "names 'layer1' twice"),
        ({"at": ["final"]}, CutError, "is the last exit already"),
        ({"at": ["layr1"]}, CutError, "no layer 'layr1'.*Did you mean 'layer1'"),
        ({"at": ["layer1.0.conv1"]}, CutError, "crossed by 2 tensors"),
        ({"at": []}, ValueError, "at least one layer"),
        ({"at": "layer1"}, ValueError, r"write exits.at=\[layer1\]"),
        ({"at": None}, ValueError, "either exits.at or exits.count"),
        ({"count": 2}, ValueError, "either exits.at or exits.count"),
        ({"at": None, "count": 0}, ValueError, "exits.count must be a whole number of at least 1"),
        ({"at": None, "count": 99}, ValueError, "cannot be spread"),
        ({"heads": {"pooling": "mean"}}, ValueError, "pooling must be one of average, max, mix"),
        ({"heads": {"convs": 3}}, ValueError, "convs must be 0, 1 or 2"),
        ({"heads": {"grid": 0}}, ValueError, "grid must be a whole number of at least 1"),
        ({"heads": {"kernel": 2}}, ValueError, "kernel must be an odd"),
        ({"split": "layer9"}, CutError, "no layer 'layer9'"),
        ({"split": "layer2", "codec": {"kind": "entropy"}}, ValueError, "codec.kind=entropy has no meaning"),
        ({"split": "layer2", "codec": {"widths": [2, 4]}}, ValueError, "codec.widths"),
        ({"codec": {"bits": 4}}, ValueError, "split.at"),
    ],
)  # fmt: skip
def test_bad_settings_are_told(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        network(**settings)
