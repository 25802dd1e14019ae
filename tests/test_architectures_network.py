from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from cleave.architectures import CutError, Insert, Step, cut, staged_network

from .tiny_networks import CODERS, FAMILIES, SAMPLE, SPLIT, Noise, Tiny, batch, family, seeded


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest) -> Any:
    return family(request.param)


# --- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_an_output_alone_equals_the_same_beside_all_others(network: Any, training: bool) -> None:
    network.train(training)
    state = copy.deepcopy(network.state_dict())

    def asked(names: Any) -> dict[str, Tensor]:
        if training:  # where statistics and ranges move
            network.load_state_dict(state)
        return seeded(network, names)

    together = asked(network.emits)
    assert list(together) == list(network.emits)
    backwards = asked(network.emits[::-1])
    for name in network.emits:
        alone = asked([name])
        assert list(alone) == [name]
        assert torch.equal(alone[name], together[name]), name
        assert torch.equal(backwards[name], together[name]), name
        assert tuple(alone[name].shape[1:]) == network.shapes[name]
    network.load_state_dict(state)
    network.eval()


def test_forward_is_the_answer(network: Any) -> None:
    name = "logits" if network.ensemble is None else "answer"
    assert torch.equal(network(batch()), network.outputs(batch(), [name])[name])
    assert network.results == ("logits",)
    assert network.input_shape == network.shapes["images"] == (1, 8, 8)


def test_what_is_asked_for_is_computed_and_nothing_more() -> None:
    built, ran = family("all at once"), []
    watch(built, ran)
    for names, expected in (
        (["layer1/input"], ["stage0"]),
        (["layer1/z", "layer1/mean"], ["stage0", "encoder"]),
        (["layer1/likelihoods"], ["stage0", "encoder", "quantizer"]),
        (["layer1/logits"], ["stage0", "exit layer1"]),
        (["layer2/level"], ["stage0", "encoder", "quantizer", "channel", "decoder", "stage1", "noise"]),
        (["layer2/reduced"], ["stage0", "encoder", "quantizer", "channel", "decoder", "stage1"]),
        ([], []),
    ):
        ran.clear()
        built.outputs(batch(), names)
        assert ran == expected, names


def watch(network: Any, ran: list[str]) -> None:
    """Write down which modules run, in order."""
    modules = {f"stage{i}": stage for i, stage in enumerate(network.stages)}
    for cut_name in network.cuts:
        for insert in network.inserts_at(cut_name):
            if insert.kind == "exit":
                modules[f"exit {cut_name}"] = insert.classifier
            elif insert.kind == "noise":
                modules["noise"] = insert
            else:
                parts = {"quantizer": insert.quantizer, "channel": insert.channel, "decoder": insert.decoder}
                parts["encoder"] = insert.encoder.mean if insert.stochastic else insert.encoder
                modules |= {name: part for name, part in parts.items() if part is not None}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))


def test_exits_classify_behind_all_stages_in_their_order() -> None:
    built, ran = family("exits"), []
    watch(built, ran)
    built.outputs(batch(), ["logits", "layer2/logits", "layer1/logits"])
    assert ran == ["stage0", "stage1", "stage2", "exit layer1", "exit layer2"]


# --- what is given --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_given_is_not_computed_again(network: Any) -> None:
    found = network.outputs(batch(), network.emits)
    ran: list[str] = []
    hooks = [stage.register_forward_hook(lambda *_, i=i: ran.append(str(i))) for i, stage in enumerate(network.stages)]
    try:
        for i, name in enumerate(network.cuts):
            ran.clear()
            again = network.outputs(None, ["logits"], given={name: found[name]})
            assert torch.equal(again["logits"], found["logits"])
            assert ran == [str(stage) for stage in range(i + 1, len(network.stages))]
        for name in network.emits:
            ran.clear()
            assert network.outputs(None, [name], given={name: found[name]})[name] is found[name]
            assert not ran
            names = [each for each in network.emits if each != name]
            given = network.outputs(batch(), names, given={name: found[name]})
            assert all(torch.equal(given[each], found[each]) for each in names)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_store_of_what_the_exits_read_serves_them_and_the_logits() -> None:
    built, ran = family("ensemble around a split"), []
    names = ["layer1/reduced", "layer2/reduced", "logits"]
    store = built.outputs(batch(), names)
    found = built.outputs(batch(), [*built.group("answers"), *built.group("exits")])
    watch(built, ran)
    again = built.outputs(None, list(found), given=store)
    assert ran == ["exit layer1", "exit layer2"]
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_what_is_given_but_does_not_suffice_says_what_is_missing() -> None:
    built = family("exits, inserted")
    found = built.outputs(batch(), ["layer2/reduced", "layer1"])
    with pytest.raises(ValueError, match="logits cannot be computed from layer2/reduced: images is missing; give it"):
        built.outputs(None, ["logits"], given={"layer2/reduced": found["layer2/reduced"]})
    with pytest.raises(ValueError, match="layer1/logits cannot be computed from layer1: images is missing"):
        built.outputs(None, ["layer1/logits"], given={"layer1": found["layer1"]})
    with pytest.raises(ValueError, match="layer2 cannot be computed from nothing"):
        built.outputs(None, ["layer2"])


def test_what_is_given_must_have_the_outputs_shape() -> None:
    built = family("insert")
    with pytest.raises(ValueError, match=r"given: layer1/z is \(3, 8, 8\) for each sample, got \(4, 8, 8\); .* stored"):
        built.outputs(None, ["logits"], given={"layer1/z": torch.zeros(2, 4, 8, 8)})
    with pytest.raises(CutError, match="no output 'layer1/zz'.*Did you mean 'layer1/z'"):
        built.outputs(None, ["logits"], given={"layer1/zz": torch.zeros(2, 3, 8, 8)})


# --- layers that work in place --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_nothing_alters_what_was_returned_or_given(network: Any, training: bool) -> None:
    network.train(training)
    images = batch()
    found = network.outputs(images, network.emits)
    assert torch.equal(images, batch())
    kept = {name: value.clone() for name, value in found.items()}
    for name in network.emits:
        network.outputs(images, network.emits, given={name: found[name]})
        assert all(torch.equal(found[each], kept[each]) for each in found), name
    network.eval()


def test_gradients_pass_whatever_is_asked_for_beside_them(network: Any) -> None:
    network.train()
    found = seeded(network, network.emits)
    sum(value.square().sum() for value in found.values()).backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in network.parameters())
    network.zero_grad()
    network.eval()


def vgg() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    features = make_layers([8, "M", 16, "M", 8])
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    whole = nn.Sequential(OrderedDict(features=features, head=head))
    return whole, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["replace", "insert", "none"])
def test_a_cut_before_a_relu_that_works_in_place(form: str) -> None:
    whole, sample = vgg()
    at = ["features.0", "features.3", "features.6"]  # an in-place ReLU follows each
    settings = {} if form == "none" else {"bottleneck": CODERS}
    built = staged_network(whole, sample, split=at[0], form=form, cuts=at, exits=at[1:], **settings).train()
    built(sample)
    built.eval()
    found = built.outputs(sample, built.emits)
    alone = {name: built.outputs(sample, [name])[name] for name in built.emits}
    assert all(torch.equal(found[name], alone[name]) for name in built.emits)
    assert all(found[name].min() < 0 for name in at)
    again = built.outputs(None, ["logits"], given={at[1]: found[at[1]]})
    assert torch.equal(found[at[1]], alone[at[1]])
    assert torch.equal(again["logits"], found["logits"])
    if form != "replace":
        features = cut(whole.eval(), at, sample).features(sample, at)
        assert torch.equal(found[f"{at[0]}/input"], features[at[0]])


class Eager(nn.Sequential):
    """Works in place on its very input."""

    def __init__(self) -> None:
        super().__init__(OrderedDict(first=nn.ReLU(inplace=True), conv=nn.Conv2d(1, 4, 3), last=nn.Conv2d(4, 3, 6)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


@pytest.mark.parametrize("settings", [{}, {"cuts": ["conv"]}, {"cuts": ["first"]}, {"exits": ["conv"]}])
def test_a_backbone_that_works_in_place_on_its_input_alters_no_image(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole, sample = Eager(), batch()
    built = staged_network(whole, sample, **settings).eval()
    assert torch.equal(sample, batch())
    expected = whole(batch())
    assert torch.equal(built(sample), expected)
    assert torch.equal(sample, batch())


class Restless(Insert):
    """Drops elements in training, in place."""

    kind = "restless"

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


def test_an_insert_that_works_in_place_in_training_alone_alters_nothing_either() -> None:
    torch.manual_seed(0)
    built = staged_network(Tiny(), SAMPLE, exits=["layer1"], inserts={"layer1": [Restless()]}).train()
    found = built.outputs(batch(), built.emits)
    assert torch.equal(found["layer1/input"], built.outputs(batch(), ["layer1/input"])["layer1/input"])
    assert (found["layer1"] == 0).float().mean() > 0.3
    given = found["layer1/input"].clone()
    built.outputs(None, ["layer1"], given={"layer1/input": given})
    assert torch.equal(given, found["layer1/input"])


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("exits", "layer1/logit", "Did you mean 'layer1/logits'"),
        ("exits", "layer3", "Did you mean 'layer2', 'layer1'.*'layer3' is a layer; name it among the cuts"),
        ("exits", "layer3/logits", "An exit emits logits"),
        ("exits", "layer1/answer", "an ensemble emit answer: ensemble=True"),
        ("exits", "layer2/z", "A bottleneck emits z"),
        ("insert", "layer1/likelihoods", "A learned prior emits likelihoods: codec=entropy_codec"),
        ("insert", "layer1/mean", "A stochastic encoder emits mean: variance='learned'"),
        ("insert", "layer1/log_variance", "A stochastic encoder emits log_variance"),
        ("replace", "layer1/input", "form='insert' keeps the feature before a bottleneck"),
        ("insert", "layer2/reduced", "An exit emits reduced"),
        ("plain", "layer2", r"logits\. 'layer2' is a layer; name it among the cuts"),
        ("plain", "whatever", r"logits\.$"),
    ],
)
def test_an_unknown_name_lists_near_ones_and_what_would_emit_it(kind: str, name: str, hint: str) -> None:
    built = family(kind)
    for ask in (built.check_names, lambda names: built.outputs(batch(), names)):
        with pytest.raises(CutError, match=f"this network has no output '{name}'; it has .*{hint}"):
            ask([name])


def test_names_between_inserts_are_not_shown() -> None:
    with pytest.raises(CutError) as error:
        family("all at once").check_names(["nothing"])
    assert ":" not in str(error.value).partition("it has")[2]


def test_one_name_alone_is_no_list() -> None:
    with pytest.raises(CutError, match=r"got the string 'logits'; write at=\['logits'\]"):
        family("plain").outputs(batch(), "logits")


def test_groups_stand_for_all_exits() -> None:
    built = family("ensemble")
    assert built.group("exits") == ("layer1/logits", "layer2/logits", "logits")
    assert built.group("answers") == ("layer1/answer", "layer2/answer", "answer")
    assert built.group("layer1") == ("layer1",)
    with pytest.raises(CutError, match="no exits; build it with exits or exits_count"):
        family("insert").group("exits")
    with pytest.raises(CutError, match="no ensemble of its exits; build it with ensemble=True"):
        family("exits").group("answers")


@pytest.mark.parametrize("name", ["images", "labels", "progress", "logits", "answer", "final"])
def test_a_layer_whose_name_means_something_else_is_no_cut(name: str) -> None:
    layers = OrderedDict([("a", nn.Conv2d(1, 4, 3)), (name, nn.Conv2d(4, 4, 3)), ("flat", nn.Flatten())])
    whole = nn.Sequential(layers | {"fc": nn.Linear(64, 3)})
    with pytest.raises(CutError, match=f"'{name}' means something else among the outputs"):
        staged_network(whole, SAMPLE, cuts=[name])
    assert staged_network(whole, SAMPLE, exits_count=1).exits[0] in ("a", "flat")


# --- several bottlenecks --------------------------------------------------------------------------------------------


class Heard:
    """A link that keeps what passes it, and may alter it."""

    def __init__(self, alter: bool = False) -> None:
        self.calls: list[str] = []
        self.payloads: dict[str, list[bytes]] = {}
        self.alter = alter

    def __call__(self, cut_name: str, codec: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls.append(cut_name)
        assert tuple(tensors) == codec.sends
        self.payloads[cut_name] = codec.encode(tensors)
        delivered = codec.decode(self.payloads[cut_name])
        name = codec.delivers[0]
        return delivered | {name: torch.zeros_like(delivered[name])} if self.alter else delivered


@pytest.mark.parametrize("kind", SPLIT)
def test_a_link_is_called_once_for_each_bottleneck_and_what_it_delivers_goes_on(kind: str) -> None:
    built, link = family(kind), Heard()
    found = built.outputs(batch(), built.emits, link=link)
    assert link.calls == list(built.bottlenecks)
    expected = built.outputs(batch(), built.emits)
    for name in built.emits:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert all(len(payloads) == len(batch()) for payloads in link.payloads.values())
    last = list(built.bottlenecks)[-1]
    altering = Heard(alter=True)
    zeroed = built.outputs(batch(), ["logits", f"{last}/sent", f"{last}/z"], link=altering)
    assert altering.calls == list(built.bottlenecks)
    assert len(zeroed[f"{last}/sent"].flatten(2).unique(dim=0)) <= len(batch())
    assert not torch.equal(zeroed["logits"], expected["logits"])
    link.calls.clear()
    built.outputs(batch(), [f"{last}/z"], link=link)
    assert link.calls == list(built.bottlenecks)[:-1]


def test_a_step_may_read_another_cuts_output() -> None:
    class Gate(Insert):
        kind = "gate"

        def steps(self) -> list[Step]:
            return [Step("forward", ("in", "layer1/z"), ("out", "share"), kind="gate")]

        emits = ("share",)

        def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            share = z.flatten(1).mean(1).sigmoid()
            return x * share.view(-1, 1, 1, 1), share

    torch.manual_seed(0)
    settings = {"split": "layer1", "form": "insert", "bottleneck": CODERS}
    built = staged_network(Tiny(), SAMPLE, inserts={"layer2": [Gate()]}, **settings).eval()
    found = built.outputs(batch(), ["layer1/z", "layer2/share", "layer2/input", "layer2"])
    share = found["layer1/z"].flatten(1).mean(1).sigmoid()
    assert torch.equal(found["layer2/share"], share)
    assert torch.equal(found["layer2"], found["layer2/input"] * share.view(-1, 1, 1, 1))


def test_a_noise_may_stand_at_a_bare_cut() -> None:
    torch.manual_seed(0)
    built = staged_network(Tiny(), SAMPLE, inserts={"layer1": [Noise()]}).train()
    found = built.outputs(batch(), ["layer1/input", "layer1"])
    assert 0.05 < (found["layer1"] - found["layer1/input"]).std() < 0.2
