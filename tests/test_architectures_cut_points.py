from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from cleave.architectures.cutting import recording
from cleave.architectures.cutting.cut_points import CutPoint, cut_points, spread
from cleave.architectures.cutting.stages import CutError, cut
from cleave.architectures.macs import count_macs, count_params

tv = torchvision.models


def images(batch: int = 1, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def test_resnet18_is_cut_between_its_blocks():
    names = [point.name for point in cut_points(tv.resnet18(), images())]
    blocks = ["layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0", "layer4"]
    assert names == ["conv1", "bn1", "relu", "maxpool", *blocks, "avgpool"]


def test_points_state_shape_bytes_and_the_cost_up_to_and_including_them():
    network = tv.resnet18()
    sample = images(3)
    points = {point.name: point for point in cut_points(network, sample)}
    stages = cut(copy.deepcopy(network), points, sample).eval()
    x, macs, params = sample[:1], 0, 0
    for name, stage in zip(points, stages, strict=False):
        macs += count_macs(stage, x)
        params += count_params(stage)
        x = stage(x)
        expected = CutPoint(name, tuple(x.shape[1:]), "NCHW", 4 * x.numel(), macs, params)
        assert points[name] == expected
    assert points["conv1"].macs == 64 * 32 * 32 * 3 * 49
    assert points["avgpool"].macs + 512 * 1000 == count_macs(network, sample[:1])
    assert points["avgpool"].params + 513 * 1000 == count_params(network)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1, bias=False)
        self.b = nn.Conv2d(3, 3, 1, bias=False)
        self.b.weight = self.a.weight
        self.same = nn.Identity()
        self.c = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.same(self.b(self.a(x))))


def test_shared_parameters_count_once_and_identities_and_the_output_are_no_points():
    points = cut_points(Shared(), images(1, 4))
    assert [(p.name, p.params, p.macs) for p in points] == [("a", 9, 144), ("b", 9, 288)]


SMALL = {
    "alexnet": (lambda: tv.alexnet(num_classes=4), 64),
    "resnet18": (tv.resnet18, 64),
    "googlenet": (lambda: tv.googlenet(aux_logits=False, init_weights=False), 64),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32), 32),
    "swin": (lambda: tv.SwinTransformer([4, 4], 24, [1, 1], [1, 2], [7, 7], 0.2), 56),
    "selecsls": (lambda: timm.create_model("selecsls42b"), 64),
    "mobilenet": (lambda: tv.mobilenet_v3_small(), 32),
    "maxvit": (lambda: tv.MaxVit((56, 56), 16, 7, [16, 32], [1, 1], 16, 0.2), 56),
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("vit", "swin"))) for name in SMALL]
)
def test_every_listed_point_is_accepted_by_cut(family):
    build, size = SMALL[family]
    network, sample = build(), images(1, size)
    points = cut_points(network, sample)
    assert len(points) > 5
    if family == "maxvit":
        assert any(point.layout == "other" for point in points)  # windows stand where rows and columns did
    # Each by itself, for that opens the least and is the hardest; where there are many, some.
    for point in points[:: 1 + len(points) // 5]:
        stages = cut(network, [point.name], sample).eval()
        feature = stages.features(sample, at=[point.name])[point.name]
        assert 4 * feature.numel() == point.bytes
        assert tuple(feature.shape[1:] if len(feature) == 1 else feature.shape) == point.shape
        assert stages.layouts == (point.layout,)
    cut(network, [point.name for point in points], sample)


def test_nothing_is_traced_again_for_a_candidate(monkeypatch):
    traced = []
    original = recording.StageTracer.trace
    monkeypatch.setattr(recording.StageTracer, "trace", lambda *args: traced.append(1) or original(*args))
    features = make_layers([8, "M", 8, "M", 8, 8, "M", 8, 8, "M", 8, 8, "M"])
    assert len(cut_points(features, images(1, 32))) == 20
    assert len(traced) == 4  # two in each mode


def test_a_value_that_turns_out_to_be_none_passes_no_cut():
    network = timm.create_model("naflexvit_base_patch16_gap", depth=3, embed_dim=48, num_heads=3)
    sample = images(1, 64)
    names = [point.name for point in cut_points(network, sample)]
    assert names[:3] == ["blocks.0", "blocks.1", "blocks.2"]
    assert torch.equal(cut(network, names[:2], sample).eval()(sample), network.eval()(sample))


def test_listing_leaves_the_backbone_alone():
    network = tv.ResNet(BasicBlock, [2, 1, 1, 1]).train()
    network.layer1.eval()
    modes = [m.training for m in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    cut_points(network, images())
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_crossvit_has_no_point_and_says_so_when_some_are_to_be_chosen():
    points = cut_points(timm.create_model("crossvit_9_240", depth=[[1, 1, 0]]), images(1, 240))
    assert points == []
    with pytest.raises(ValueError, match="no single-tensor cut point"):
        spread(points, 1)


class DataDependent(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.inner = inner or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.inner(x) if x.sum() > 0 else x


def test_a_module_that_cannot_be_traced_stays_whole_and_a_backbone_that_cannot_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), DataDependent(), nn.Sequential(DataDependent(), nn.ReLU()), nn.ReLU())
    assert [point.name for point in cut_points(network, images(1, 8))] == ["0", "1", "2.0", "2"]
    with pytest.raises(CutError, match=r"^DataDependent cannot be taken apart here: .* branches on the values"):
        cut_points(DataDependent(), images(1, 8))
    with pytest.raises(CutError, match="itself does not run in eval mode"):
        cut_points(network, torch.zeros(1, 5, 8, 8))


# --- spread


def line(*work: int, sizes: tuple[int, ...] = ()) -> list[CutPoint]:
    sizes = sizes or (4,) * len(work)
    return [CutPoint(f"p{i}", (1,), "NC", size, w, 10 - i) for i, (w, size) in enumerate(zip(work, sizes, strict=True))]


def test_names_stand_at_even_shares_of_the_work():
    assert spread(line(*range(10, 101, 10)), 4) == ["p1", "p3", "p5", "p7"]
    assert spread(line(*range(10, 101, 10)), 1) == ["p4"]


def test_all_points_can_be_taken():
    assert spread(line(5, 5, 5), 3) == ["p0", "p1", "p2"]


def test_points_stay_distinct_and_in_order_where_the_work_is_lopsided():
    assert spread(line(90, 91, 92, 100), 3) == ["p0", "p1", "p2"]
    assert spread(line(1, 2, 3, 100), 2) == ["p2", "p3"]


def test_of_equal_work_the_fewest_bytes_win_then_the_first():
    assert spread(line(50, 50, 50, 100, sizes=(8, 4, 4, 4)), 1) == ["p1"]


def test_choice_is_the_best_of_all_choices():
    from itertools import combinations

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        work = torch.randint(1, 50, (7,), generator=generator).cumsum(0).tolist()
        points = line(*work)
        for n in (1, 2, 3, 5):

            def distance(names, n=n, work=work):
                return sum(abs(work[int(p[1:])] - work[-1] * i / (n + 1)) for i, p in enumerate(names, start=1))

            best = min(distance([p.name for p in some]) for some in combinations(points, n))
            assert distance(spread(points, n)) == pytest.approx(best)


def test_work_can_be_parameters():
    points = [replace(p, params=q) for p, q in zip(line(1, 2, 3, 100), (10, 50, 90, 100), strict=True)]
    assert spread(points, 1, by="params") == ["p1"]
    assert spread(points, 1, by="macs") == ["p2"]


@pytest.mark.parametrize(
    ("n", "by", "message"),
    [
        (5, "macs", "n = 5 cut points cannot be spread: there are 4 cut points"),
        (0, "macs", "n = 0"),
        (1, "latency", "by is 'macs' or 'params', got 'latency'"),
    ],
)
def test_bad_arguments_are_named(n, by, message):
    with pytest.raises(ValueError, match=message):
        spread(line(1, 2, 3, 4), n, by=by)
