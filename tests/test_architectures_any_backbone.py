"""Networks of other inputs and results than images and classes, and backbones that nothing cuts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures import (
    CutError,
    cut,
    cut_points,
    entropy_codec,
    multi_exit_network,
    split_network,
    staged_network,
)
from cleave.deployment import ConfidencePolicy, build_policy, offline

from .tiny_networks import CODERS, CODES, SAMPLE, batch

# --- tokens ---------------------------------------------------------------------------------------------------------

TOKENS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention of two heads and a perceptron, each beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(samples, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class Text(nn.Module):
    """Token ids (B, L) to the logits of four classes, with blocks of our own or of torch."""

    def __init__(self, ours: bool = True) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(50, 16), nn.Embedding(12, 16)
        blocks = [Block(16) if ours else nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3)]
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.position(places)
        return self.head(self.norm(self.blocks(x)).mean(1))


def text(ours: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Text(ours)


@pytest.mark.parametrize("ours", [True, False])
def test_a_network_of_tokens_is_cut_between_its_blocks(ours: bool) -> None:
    whole = text(ours)
    points = cut_points(whole, TOKENS)
    assert [(p.name, p.shape, p.layout) for p in points] == [
        (name, (12, 16), "NLC") for name in ("blocks.0", "blocks.1", "blocks", "norm")
    ]
    stages = cut(whole, [p.name for p in points], TOKENS)
    assert stages.layouts == ("NLC",) * 4
    for training in (False, True):
        torch.manual_seed(1)
        expected = whole.train(training)(TOKENS)
        torch.manual_seed(1)
        assert torch.equal(stages.train(training)(TOKENS), expected)


@pytest.mark.parametrize(
    ("whole", "sample", "layout"),
    [
        (nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Flatten(), nn.Linear(96, 3)), TOKENS, "NLC"),
        (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)), torch.randn(2, 12, 5), "NLC"),
        (nn.Sequential(nn.Conv1d(5, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)), torch.randn(2, 5, 12), "other"),
        (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5), "NC"),
    ],
    ids=["token ids", "sequences of features", "sequences behind channels", "vectors"],
)
def test_any_one_tensor_may_be_the_input(whole: nn.Module, sample: Tensor, layout: str) -> None:
    points = cut_points(whole, sample)
    assert {p.name: p.layout for p in points if p.name in "01"} == {"0": layout, "1": layout}
    assert torch.equal(cut(whole, ["0"], sample).eval()(sample), whole.eval()(sample))


@pytest.mark.parametrize("codec", [CODES, entropy_codec])
def test_tokens_take_bottlenecks_and_exits(codec: Any) -> None:
    settings = {"exits": ["blocks.0", "blocks.1"], "exit_head": {"convs": 0}, "cascade": True, "ensemble": True}
    split = {"split": "blocks.0", "form": "insert", "bottleneck": {"channels": 4}, "codec": codec}
    built = staged_network(text(), TOKENS, **settings, **split).eval()
    assert built.shapes["blocks.0/z"] == (12, 4)
    assert built.input_shape == (12,)
    found = built.outputs(TOKENS, built.emits)
    assert all(torch.equal(built.outputs(TOKENS, [name])[name], found[name]) for name in built.emits)
    again = built.outputs(None, ["logits"], given={"blocks.0": found["blocks.0"]})
    assert torch.equal(again["logits"], found["logits"])
    assert [c.macs for c in built.costs() if c.kind == "encoder"] == [12 * 16 * 4]
    with torch.no_grad():
        own = torch.stack([found[name] for name in built.group("exits")])
        never = build_policy("confidence", None, exits=3)
        policy = never.with_thresholds([float(row.median()) for row in never.scores(own)[:-1]])
        assert torch.equal(built.run(TOKENS, policy).index, offline(policy, own).index)
    built.train()
    sum(value.square().mean() for value in built.outputs(TOKENS, built.emits).values()).backward()
    assert dict(built.named_weights())["embed.weight"].grad.any()


def test_tokens_cannot_be_made_by_an_encoder_of_images() -> None:
    with pytest.raises(ValueError, match="form=insert"):
        split_network(text(), "blocks.0", TOKENS, form="replace")


# --- several results ------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """Boxes and scores of a map, as a dictionary or a tuple."""

    def __init__(self, kind: type = dict) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.neck = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.neck(self.body(x))
        found = {"boxes": self.boxes(x).flatten(2).mT, "scores": self.scores(x).flatten(2).mT}
        return found if self.kind is dict else self.kind(found.values())


@pytest.mark.parametrize(
    ("kind", "results"), [(dict, ("output/boxes", "output/scores")), (tuple, ("output/0", "output/1"))]
)
@pytest.mark.parametrize("settings", [{}, {"cuts": ["body"]}, {"split": "body", "bottleneck": CODERS, "codec": CODES}])
def test_a_network_may_have_several_results(kind: type, results: tuple[str, ...], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = Detector(kind).eval()
    built = staged_network(whole, SAMPLE, **settings).eval()
    assert built.results == results
    assert [built.shapes[name] for name in results] == [(16, 4), (16, 2)]
    found = built.outputs(batch(), results)
    answer = built(batch())
    assert list(answer) == list(results)
    assert all(torch.equal(answer[name], found[name]) for name in results)
    assert torch.equal(built.outputs(batch(), results[1:])[results[1]], found[results[1]])
    if "split" not in settings:
        expected = whole(batch())
        values = expected.values() if kind is dict else expected
        assert all(torch.equal(a, b) for a, b in zip(found.values(), values, strict=True))
    assert built.exit_costs() == [sum(cost.macs for cost in built.costs())]
    assert "logits" not in built.emits
    for ask in (lambda: built.outputs(batch(), ["logits"]), lambda: built.run(batch(), ConfidencePolicy(()))):
        with pytest.raises(CutError, match="no output 'logits'"):
            ask()
    with pytest.raises(ValueError, match=r"must return logits \(B, classes\); got (dict|tuple)"):
        staged_network(Detector(kind), SAMPLE, exits=["body"])


def test_one_result_in_a_tuple_is_named_too() -> None:
    class One(Detector):
        def forward(self, x: Tensor) -> Any:
            return (super().forward(x)["boxes"],)

    built = staged_network(One(), SAMPLE, cuts=["body"]).eval()
    assert built.results == ("output/0",)
    assert built(batch()).shape == (6, 16, 4)


def test_results_that_are_no_tensors_or_differ_in_training_are_refused() -> None:
    class Worded(Detector):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) | {"words": "none"}

    class Twofold(Detector):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return found if self.training else found["boxes"]

    with pytest.raises(CutError, match="must return a tensor, or tensors in a .*; got dict of Tensor, str"):
        staged_network(Worded(), SAMPLE)
    built = staged_network(Twofold(), SAMPLE)
    assert built.eval()(batch()).shape == (6, 16, 4)
    with pytest.raises(CutError, match="returned output/boxes, output/scores now, but logits when the network"):
        built.train()(batch())


# --- dense predictions ----------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """Classes of every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.body(self.down(x)))


def test_a_network_may_predict_for_every_pixel() -> None:
    torch.manual_seed(0)
    built = split_network(Dense(), "down", SAMPLE, form="insert", bottleneck=CODERS, codec=CODES, cuts=["body"]).eval()
    assert built.shapes["logits"] == (3, 8, 8)
    found = built.outputs(batch(), built.emits)
    assert found["logits"].shape == (6, 3, 8, 8)
    assert torch.equal(built.outputs(None, ["logits"], given={"body": found["body"]})["logits"], found["logits"])
    assert built(torch.randn(2, 1, 16, 24)).shape == (2, 3, 16, 24)  # it is bound to no size
    with pytest.raises(ValueError, match=r"must return logits \(B, classes\); got shape \(1, 3, 8, 8\)"):
        multi_exit_network(Dense(), SAMPLE, at=["down"])


# --- nothing cuts it ------------------------------------------------------------------------------------------------


class Steering(nn.Module):
    """A forward that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 4), nn.Linear(64, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.flatten(1)
        return self.first(x) if x.sum() > 0 else self.second(x)


def test_a_backbone_that_nothing_cuts_is_the_only_stage_and_untouched() -> None:
    torch.manual_seed(0)
    whole = Steering()
    twin = copy.deepcopy(whole)
    built = staged_network(whole, SAMPLE)
    assert list(built.stages) == [whole]
    assert list(built.state_dict()) == list(twin.state_dict())
    assert built.emits == ("logits",)
    for sign in (1, -1):
        x = sign * batch().abs()
        assert torch.equal(built(x), twin(x))
        twin.zero_grad()
        built.zero_grad()
        built(x).square().sum().backward()
        twin(x).square().sum().backward()
        ours, theirs = ([p.grad for p in module.parameters() if p.grad is not None] for module in (whole, twin))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    whole.calls = 0
    built(batch())
    assert whole.calls == 1
    assert list(built.parts()) == ["backbone"]
    assert [(c.name, c.kind, c.macs) for c in built.costs()] == [("final", "stage", 64 * 4)]
    with pytest.raises(CutError, match="cannot be taken apart here: .* branches on the values of a tensor"):
        staged_network(whole, SAMPLE, cuts=["first"])
