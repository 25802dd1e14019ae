from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleave.architectures import Insert, StagedNetwork, Stages, cut, staged_network

from .tiny_networks import CODERS, CODES, SAMPLE, Noise, Tiny, batch


class Scale(Insert):
    """The simplest insert there is."""

    kind = "scale"

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Statistics(Insert):
    """It passes the feature on as it came, and emits something of it."""

    kind = "statistics"
    passes = False
    emits = ("mean", "variance")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(2).mean(2), x.flatten(2).var(2)


def tiny(**settings: Any) -> StagedNetwork:
    torch.manual_seed(0)
    return staged_network(Tiny(), SAMPLE, **settings).eval()


def test_a_forward_is_all_that_an_insert_needs() -> None:
    built = tiny(inserts={"layer1": [Scale()]}, cuts=["layer2"])
    assert built.emits == ("layer1/input", "layer1", "layer2/input", "layer2", "logits")
    found = built.outputs(batch(), built.emits)
    assert torch.equal(found["layer1"], 2 * found["layer1/input"])
    assert torch.equal(built.stages[1](found["layer1"].clone()), found["layer2"])
    assert list(built.parts()) == ["backbone", "scale/layer1"]
    assert built.resolve(["scale"]) == ("scale/layer1",)
    assert "at:layer1.scale.factor" in built.state_dict()
    assert ("layer1", "scale", 0, 1) in [(c.name, c.kind, c.macs, c.params) for c in built.costs()]
    assert built.inserts_at("layer1")[0] in built.leaves()


def test_an_insert_may_emit_what_it_likes() -> None:
    built = tiny(inserts={"layer1": [Noise()], "layer2": [Statistics()]})
    found = built.outputs(batch(), built.emits)
    assert found["layer1/level"].shape == (6, 8)
    assert torch.equal(found["layer2"], found["layer2/input"])
    assert torch.equal(found["layer2/mean"], found["layer2"].mean((2, 3)))
    assert list(built.outputs(batch(), ["layer2/variance"])) == ["layer2/variance"]
    assert built.exits == ()  # what emits no logits is none
    ran = []
    built.inserts_at("layer2")[0].register_forward_hook(lambda *_: ran.append(1))
    built(batch())
    assert not ran  # nobody reads what it emits


def test_inserts_pass_the_feature_on_in_their_order() -> None:
    class Shift(Scale):
        kind = "shift"

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    for inserts, expected in (([Scale(), Shift()], lambda x: 2 * x + 1), ([Shift(), Scale()], lambda x: 2 * (x + 1))):
        built = tiny(inserts={"layer1": inserts})
        found = built.outputs(batch(), ["layer1/input", "layer1"])
        assert torch.equal(found["layer1"], expected(found["layer1/input"]))


def test_inserts_stand_before_a_bottleneck_and_behind_one_that_replaces_the_head() -> None:
    built = tiny(inserts={"layer1": [Scale()]}, split="layer1", form="insert", bottleneck=CODERS, codec=CODES)
    found = built.outputs(batch(), ["layer1/input", "layer1/z"])
    encoder = built.bottlenecks["layer1"].encoder
    assert torch.equal(found["layer1/z"], encoder(2 * found["layer1/input"]))
    built = tiny(inserts={"layer1": [Scale()]}, split="layer1", bottleneck=CODERS, codec=CODES, exits=["layer1"])
    found = built.outputs(batch(), ["layer1/z", "layer1/received", "layer1", "layer1/reduced"])
    bottleneck = built.bottlenecks["layer1"]
    assert torch.equal(found["layer1/z"], bottleneck.encoder(batch()))
    assert torch.equal(found["layer1"], 2 * bottleneck.decoder(found["layer1/received"]))
    assert torch.equal(found["layer1/reduced"], found["layer1"])
    assert list(built.parts())[-2:] == ["tail", "exits/layer1"]


def test_batchnorm_of_an_insert_follows_the_width_of_what_it_reads() -> None:
    class Norm(Insert):
        kind = "norm"

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    widths = {"codec": {"bits": 4, "widths": [2, 4]}, "bottleneck": CODERS, "split": "layer1"}
    for form, at, switched in (
        ("insert", "layer1", False),
        ("replace", "layer1", True),
        ("insert", "layer2", True),
        ("replace", "layer2", True),
    ):
        built = tiny(inserts={at: [Norm()]}, form=form, **widths)
        assert any(f"at:{at}.norm.layer.sets.2" in name for name in built.state_dict()) == switched, (form, at)


class Named(Scale):
    def __init__(self, **names: Any) -> None:
        super().__init__()
        for name, value in names.items():
            setattr(self, name, value)

    def parts(self) -> dict[str, nn.Module]:
        return {getattr(self, "part", self.kind): self}


@pytest.mark.parametrize(
    ("inserts", "error", "words"),
    [
        ([Scale(), Scale()], ValueError, "two inserts at 'layer1' are called 'scale'; name one of them otherwise"),
        ([Named(emits=("a", "b")), Named(kind="other", emits=("b",))], ValueError, "at 'layer1' emit 'b'"),
        ([Named(part="one"), Named(kind="other", part="one")], ValueError, "have a part 'one'"),
        ([Named(emits=("input",))], ValueError, "emits 'input', which means something else at a cut"),
        ([Named(emits=("layer2/z",))], ValueError, "emits 'layer2/z'"),
        ([Named(emits=("answer",))], ValueError, "emits 'answer'"),
        ([Named(kind="head")], ValueError, "has a part 'head', which means something else in a network"),
        ([Named(passes=False)], ValueError, "passes nothing on and emits nothing"),
        ([nn.ReLU()], TypeError, 'must be an Insert with a kind, got ReLU.*kind = "name"'),
        ([type("Nameless", (Insert,), {})()], TypeError, "must be an Insert with a kind, got Nameless"),
    ],
)
def test_inserts_that_cannot_stand_together_are_refused(inserts: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny(inserts={"layer1": inserts})


def test_an_insert_may_be_called_as_what_it_emits() -> None:
    built = tiny(inserts={"layer2": [Named(kind="mask", emits=("mask",), forward=lambda x: (x, x.abs()))]})
    found = built.outputs(batch(), ["layer2", "layer2/mask"])
    assert torch.equal(found["layer2/mask"], found["layer2"].abs())


def test_two_emit_one_name_with_a_bottleneck_or_an_exit_among_them() -> None:
    with pytest.raises(ValueError, match="two inserts at 'layer1' emit 'z'"):
        tiny(inserts={"layer1": [Named(emits=("z",))]}, split="layer1", form="insert", bottleneck=CODERS)
    with pytest.raises(ValueError, match="two inserts at 'layer1' emit 'reduced'"):
        tiny(inserts={"layer1": [Named(emits=("reduced",))]}, exits=["layer1"])
    with pytest.raises(ValueError, match="two inserts at 'layer1' have a part 'encoder'"):
        tiny(inserts={"layer1": [Named(part="encoder")]}, split="layer1", form="insert", bottleneck=CODERS)


def test_an_insert_where_nothing_is_cut_is_refused() -> None:
    stages: Stages = cut(Tiny().eval(), ["layer1"], SAMPLE)
    with pytest.raises(ValueError, match="an insert is given at 'layer2', which is no cut: there are layer1"):
        StagedNetwork(stages, {"layer2": [Scale()]}, sample=SAMPLE)
