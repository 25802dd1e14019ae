from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter, OrderedDict

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from cleave.architectures.cutting import stages as module_under_test
from cleave.architectures.cutting.recording import StageTracer
from cleave.architectures.cutting.stages import CutError, Stages, cut

from .tiny_networks import made_once

tv = torchvision.models


def perturbed(network: nn.Module) -> nn.Module:
    """Weights without the zeros of fresh layers, behind which a fault could hide."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return network


def images(batch: int = 1, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def vgg_features() -> nn.Module:
    """VGG of few channels, without the 120 million weights of its classifier."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    channels = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
    layers = {"features": make_layers(channels, batch_norm=True), "pool": pool, "classifier": nn.Linear(64, 10)}
    return nn.Sequential(OrderedDict(layers))


def alexnet() -> nn.Module:
    """AlexNet with 64 features in its classifier in place of 4096."""
    network = tv.alexnet(num_classes=10)
    network.classifier[1], network.classifier[4], network.classifier[6] = (
        nn.Linear(9216, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 10),
    )
    return network


def resnet() -> nn.Module:
    """A ResNet whose later stages have one block each."""
    return tv.ResNet(BasicBlock, [2, 1, 1, 1])


# name: network, cuts, image size; dropout, drop-path and batch norm on wherever there are any
FAMILIES = {
    "resnet18": (lambda: tv.resnet18(), ["maxpool", "layer1.0", "layer2", "avgpool"], 64),
    "alexnet": (alexnet, ["features.0", "features.2", "avgpool", "classifier.1"], 64),
    "vgg11_bn": (vgg_features, ["features.1", "features.4", "features.28"], 32),
    "densenet": (
        lambda: timm.create_model("densenet121", growth_rate=8, block_config=(2, 2, 2, 2), drop_rate=0.2),
        ["features.denseblock1", "features.transition2.pool", "features.denseblock4"],
        64,
    ),
    "swin": (
        lambda: tv.SwinTransformer([4, 4], 32, [1, 2, 1], [1, 2, 4], [7, 7], stochastic_depth_prob=0.3),
        ["features.1.0", "features.2", "features.3.0", "norm"],
        64,
    ),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=4, img_size=64, drop_path_rate=0.3, proj_drop_rate=0.1),
        ["patch_embed", "blocks.0", "blocks.2", "norm"],
        64,
    ),
    "selecsls": (lambda: timm.create_model("selecsls42b"), ["stem", "features.2.conv1.0", "head.0.0"], 64),
    "convnext": (
        lambda: timm.create_model("convnext_atto", drop_path_rate=0.3),
        ["stem", "stages.1.blocks.0", "stages.3"],
        64,
    ),
    "efficientnet": (
        lambda: timm.create_model("test_efficientnet", drop_rate=0.2, drop_path_rate=0.2),
        ["conv_stem", "blocks.2.0", "blocks.4", "global_pool"],
        64,
    ),
}


def make(family: str) -> tuple[nn.Module, list[str], Tensor]:
    _, at, size = FAMILIES[family]
    made = {"family": family}
    network = _make(made) if family == "selecsls" else made_once(_make, made)  # its 30 million weights are not kept
    return network, at, images(1, size)


def _make(settings: dict[str, str]) -> nn.Module:
    torch.manual_seed(0)
    return perturbed(FAMILIES[settings["family"]][0]())


def train_step(network: nn.Module, owner: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network.train()
    torch.manual_seed(5)
    out = network(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **found, **{f"buffer {name}": b for name, b in owner.named_buffers()}}


# SelecSLS, the largest, is cut in eval mode below.
@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f == "selecsls")) for f in FAMILIES])
def test_stages_reproduce_the_backbone_in_both_modes(family):
    network, at, sample = make(family)
    twin = copy.deepcopy(network)
    stages = cut(twin, at, sample)
    assert stages.names == tuple(at)
    batch = torch.cat([sample, sample.flip(-1), sample.flip(-2)])
    with torch.no_grad():
        assert torch.equal(stages.eval()(batch), network.eval()(batch))
    expected, actual = train_step(network, network, batch), train_step(stages, twin, batch)
    assert len(expected) > 10
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dropout_and_drop_path_are_on_in_training_and_off_in_eval_mode():
    network, at, sample = make("vit")
    stages = cut(network, at, sample)
    batch = sample.repeat(4, 1, 1, 1)
    stages.train()
    torch.manual_seed(0)
    first = stages(batch)
    assert not torch.equal(first, stages(batch))
    stages.eval()
    assert torch.equal(stages(batch), stages(batch))


def test_partial_modes_are_those_of_the_backbone():
    network, at, sample = make("resnet18")
    network.train()
    network.layer1.eval().requires_grad_(False)
    network.layer2[0].bn1.eval()
    modes = {name: m.training for name, m in network.named_modules()}
    stages = cut(network, [*at[:2], "layer2.0"], sample)
    assert {name: m.training for name, m in network.named_modules()} == modes
    for stage in stages:
        assert {name: m.training for name, m in stage.named_modules()} == {
            name: modes[name] for name, _ in stage.named_modules()
        }
    before = {name: b.clone() for name, b in network.named_buffers()}
    reference = copy.deepcopy(network)
    batch = images(4)
    assert torch.equal(stages(batch), reference(batch))
    assert all(torch.equal(b, dict(reference.named_buffers())[name]) for name, b in network.named_buffers())
    changed = {name for name, b in network.named_buffers() if not torch.equal(b, before[name])}
    assert "bn1.running_mean" in changed
    assert not any(name.startswith(("layer1.", "layer2.0.bn1.")) for name in changed)


def test_cutting_disturbs_neither_buffers_nor_generator_nor_attributes_nor_gradients():
    network, at, sample = make("efficientnet")
    network.train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in network.named_modules()}
    kept = sample.clone()
    generator = torch.get_rng_state()
    cut(network, at, sample)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(sample, kept)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert {name: set(vars(m)) for name, m in network.named_modules()} == attributes
    assert all(m.training for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_stages_share_parameters_and_a_cut_copy_shares_none():
    network, at, sample = make("resnet18")
    shared = cut(network, at, sample)
    own = {name: p.data_ptr() for name, p in network.named_parameters()}
    assert {name.partition(".")[2]: p.data_ptr() for name, p in shared.named_parameters()} == own
    assert {name.partition(".")[2] for name in shared.state_dict()} == set(network.state_dict())
    apart = cut(copy.deepcopy(network), at, sample)
    theirs = {t.data_ptr() for t in (*apart.parameters(), *apart.buffers())}
    assert not theirs & {t.data_ptr() for t in (*network.parameters(), *network.buffers())}
    apart.requires_grad_(False)
    assert all(p.requires_grad for p in network.parameters())


def test_deepcopied_stages_share_nothing_with_the_backbone():
    network, at, sample = make("swin")
    stages = cut(network, at, sample).eval()
    twin = copy.deepcopy(stages)
    mine = {t.data_ptr() for t in (*network.parameters(), *network.buffers())}
    assert not mine & {t.data_ptr() for t in (*twin.parameters(), *twin.buffers())}
    expected = stages(sample)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(twin(sample), expected)
    assert not torch.equal(stages(sample), expected)


@pytest.mark.parametrize("family", ["resnet18", "swin", "vit", "convnext"])
def test_copies_and_pickles_keep_both_modes_and_what_the_stages_know(family):
    network, at, sample = make(family)
    stages = cut(network, at, sample)
    batch = torch.cat([sample, sample.flip(-1)])
    for again in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):  # noqa: S301
        twin = again(stages)
        assert (twin.names, twin.layouts, len(twin)) == (stages.names, stages.layouts, len(stages))
        for training in (True, False):
            stages.train(training)
            twin.train(training)
            torch.manual_seed(1)
            expected = stages(batch)
            torch.manual_seed(1)
            assert torch.equal(twin(batch), expected)
        twin.features(sample, at=at[:1])


@pytest.mark.parametrize("family", ["resnet18", "swin", "vit"])
def test_stages_trace_to_torchscript_at_any_batch_size(family):
    network, at, sample = make(family)
    stages = cut(network, at, sample).eval()
    x, other = sample, images(3, sample.shape[-1])
    expected = stages(other)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch marks TorchScript deprecated; deployment wraps it
        for stage in stages:
            script = torch.jit.trace(stage, (x,), check_trace=False)
            x, other = stage(x), script(other)
    torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at what a stage passes to the next
def test_compile_compiles_each_stage_and_is_left_out_of_pickles(take_probes):
    network, at, sample = make("resnet18")
    stages = cut(network, at, sample).eval()
    expected = stages.features(sample, at=["layer2"])["layer2"]
    take_probes()
    keys = list(stages.state_dict())
    calls: list[str] = []
    torch._dynamo.reset()  # what another test has compiled of these layers would be taken again

    def backend(graph, inputs):
        calls.append(graph._get_name())
        return graph

    stages.compile(backend=backend)
    assert list(stages.state_dict()) == keys
    assert torch.equal(stages.features(sample, at=["layer2"])["layer2"], expected)
    assert len(calls) == 3  # neither of the two stages behind layer2
    twin = pickle.loads(pickle.dumps(stages))  # noqa: S301
    assert all(stage._compiled_call_impl is None for stage in twin)
    assert torch.equal(twin(sample), network.eval()(sample))


# --- features


def counted(stages: Stages) -> Counter[int]:
    runs: Counter[int] = Counter()
    for i, stage in enumerate(stages):
        stage.register_forward_hook(lambda *_, i=i: runs.update([i]))
    return runs


def test_features_run_no_further_than_the_last_name():
    network, at, sample = make("resnet18")
    stages = cut(network, at, sample).eval()
    runs = counted(stages)
    found = stages.features(sample, at=["layer2", "maxpool"])
    assert list(found) == ["maxpool", "layer2"]
    assert runs == {0: 1, 1: 1, 2: 1}
    runs.clear()
    assert stages.features(sample, at=[]) == {}
    assert not runs


def test_features_equal_what_hooks_on_the_backbone_see():
    network, at, sample = make("resnet18")
    stages = cut(copy.deepcopy(network), at, sample).eval()
    seen: dict[str, Tensor] = {}
    for name in at:
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.clone()})
        )
    network.eval()(sample)
    found = stages.features(sample, at=at)
    assert all(torch.equal(found[name], seen[name]) for name in at)


@pytest.mark.parametrize(
    ("family", "at", "altered"),
    [
        ("alexnet", ["features.0", "features.3", "features.6"], [True, True, True]),
        ("alexnet", ["avgpool", "classifier.1"], [False, True]),
        ("vgg11_bn", ["features.0", "features.1"], [False, True]),  # batch norm makes a new tensor, ReLU does not
        ("resnet18", ["conv1", "bn1", "layer1"], [False, True, False]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_features_are_not_altered_by_later_in_place_layers(family, at, altered, training):
    network, _, sample = make(family)
    stages = cut(network, at, sample).train(training)
    batch = torch.cat([sample, sample.flip(-1)])
    torch.manual_seed(0)
    found = stages.features(batch, at=at)
    for name in at:
        torch.manual_seed(0)
        alone = stages.features(batch, at=[name])[name].clone()
        assert torch.equal(found[name], alone)
    assert stages._altered == [False, *altered]
    assert (found[at[0]] < 0).any() or (family == "alexnet" and at[0] == "avgpool")


class InPlaceLater(nn.Module):
    """The tensor of ``first`` is altered two stages later, through a view, and in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.flat = nn.Flatten()
        self.drop = nn.Dropout(0.5, inplace=True)
        self.last = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.flat(self.first(x))))


def test_features_are_protected_from_views_and_from_layers_that_work_in_place_in_training_alone():
    network = InPlaceLater()
    sample = images(2, 8)
    network(sample)
    stages = cut(network, ["first", "flat", "drop"], sample).train()
    found = stages.features(sample, at=["first", "flat", "drop"])
    assert torch.equal(found["first"], network.first(sample))
    assert torch.equal(found["flat"], network.first(sample).flatten(1))
    assert (found["drop"] == 0).any()


def test_protected_features_pass_gradients():
    network, _, sample = make("alexnet")
    stages = cut(network, ["features.0", "features.2"], sample)
    found = stages.features(sample, at=["features.0", "features.2"])
    (found["features.0"].sum() + found["features.2"].sum()).backward()
    assert network.features[0].weight.grad.abs().sum() > 0


def test_a_feature_that_was_not_cut_is_refused_with_the_nearest_names():
    network, at, sample = make("resnet18")
    stages = cut(network, at, sample)
    with pytest.raises(CutError, match=r"no feature is kept at 'layer3': it was cut at maxpool, .*'layer2'"):
        stages.features(sample, at=["layer3"])
    with pytest.raises(CutError, match=r"write at=\['layer2'\]"):
        stages.features(sample, at="layer2")
    with pytest.raises(CutError, match="not cut anywhere"):
        cut(network, [], sample).features(sample, at=["layer3"])


# --- the container


def test_stages_are_a_sequence_of_named_children():
    network, at, sample = make("resnet18")
    stages = cut(network, at, sample)
    assert [name for name, _ in stages.named_children()] == [f"stage{i}" for i in range(5)]
    assert len(stages) == 5
    assert list(stages) == [stages[i] for i in range(5)]
    assert stages[-1] is stages.stage4
    for index in (5, -6):
        with pytest.raises(IndexError, match="of 5"):
            stages[index]


def test_no_cuts_give_one_stage_and_a_cut_at_the_end_an_empty_last_one():
    network, _, sample = make("resnet18")
    whole = cut(network, [], sample).eval()
    assert (len(whole), whole.names, whole.layouts) == (1, (), ())
    logits = network.eval()(sample)
    assert torch.equal(whole(sample), logits)
    ended = cut(network, ["layer4", "fc"], sample).eval()
    assert torch.equal(ended.features(sample, at=["fc"])["fc"], logits)
    assert not list(ended[2].parameters())


def test_layouts_stand_beside_the_names():
    network, at, sample = make("swin")
    assert cut(network, [*at, "permute", "flatten"], sample).layouts == ("NHWC",) * 4 + ("NCHW", "NC")


# --- refusals


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * 2


class Sum(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


class Pairs(nn.Module):
    """A layer that returns a pair, one that is never called, one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.two = Two()
        self.inner = nn.Sequential(Two(), Sum())
        self.sum = Sum()
        self.unused = nn.ReLU()
        self.alias = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.sum(self.two(self.conv(x))))


class Shapes(nn.Module):
    """Reads the shape at the start and uses it at the end: whole, or number by number."""

    def __init__(self, whole: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 3, 1)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        batch, channels, height, width = shape
        x = self.last(self.conv(x).flatten(2).unflatten(2, (height, width)))
        return x.reshape(shape) if self.whole else x.reshape(batch, channels * height, width // 1)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.relu() if x.sum() > 0 else x


class Counting(nn.Module):
    """Traces, but to something else: the batch size is read from a list that tracing does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * 2 if isinstance(x, Tensor) else x


REFUSALS = {
    "an unknown layer": (resnet, ["layer22"], r"ResNet has no layer 'layer22'\. Did you mean 'layer2'"),
    "several tensors": (
        resnet,
        ["layer1.0.bn1"],
        r"cut after 'layer1\.0\.bn1' is crossed by 2 tensors: 'maxpool', 'layer1\.0\.bn1'",
    ),
    "several tensors between operations": (
        resnet,
        ["layer1", "layer2.0.conv2"],
        r"crossed by 2 tensors: 'layer1\.1\.relu:2|'layer1'",
    ),
    "a value that is no tensor": (Shapes, ["conv"], r"crossed by 2 values: 'getattr' \(Size\), 'conv'\."),
    "out of order": (
        resnet,
        ["layer2", "layer1", "fc"],
        "out of order: the backbone runs them as layer1, layer2, fc",
    ),
    "given twice": (resnet, ["layer1", "layer1"], "'layer1' is given twice"),
    "one tensor under two names": (
        resnet,
        ["layer1.1", "layer1"],
        "'layer1.1' and 'layer1' end with the same tensor",
    ),
    "a pair": (Pairs, ["two"], "'two' returns a tuple, not one tensor"),
    "a pair inside": (Pairs, ["inner.0"], "'inner.0' returns a tuple, not one tensor"),
    "not called": (Pairs, ["unused"], "'unused' is not called"),
    "a second name": (Pairs, ["alias"], "'alias' is the same module as 'conv'"),
    "no trace": (
        DataDependent,
        ["conv"],
        r"cannot be taken apart here: .* in the forward of DataDependent branches on the values of a tensor",
    ),
    "another function": (Counting, ["conv"], "do not reproduce Counting in eval mode"),
    "a string": (resnet, "layer1", r"at is a list of layer names, got the string 'layer1'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why_in_one_sentence_and_leave_the_backbone_alone(case):
    build, at, message = REFUSALS[case]
    network = build().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CutError, match=message) as caught:
        cut(network, at, images())
    assert "\n" not in str(caught.value)
    assert all(m.training for m in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_crossing_is_looked_at_in_the_least_and_the_most_open_graph_alone(monkeypatch):
    traced = []
    original = StageTracer.trace
    monkeypatch.setattr(StageTracer, "trace", lambda *args: traced.append(1) or original(*args))
    with pytest.raises(CutError, match="crossed by 2 tensors"):
        cut(tv.resnet18(), ["layer1.0.bn1"], images())
    assert len(traced) == 8  # each in both modes, twice


@pytest.mark.slow
def test_crossvit_is_refused_in_words():
    network = timm.create_model("crossvit_9_240")
    with pytest.raises(CutError, match="'blocks.0' returns a list, not one tensor"):
        cut(network, ["blocks.0"], images(1, 240))
    with pytest.raises(CutError, match="'patch_embed.1' is crossed by .*'pos_drop', 'patch_embed.1'"):
        cut(network, ["patch_embed.1"], images(1, 240))


@pytest.mark.parametrize("sample", [None, torch.zeros(0, 3, 64, 64), torch.zeros(3)])
def test_a_sample_that_is_no_batch_is_refused(sample):
    with pytest.raises(CutError, match="sample is a batch, one tensor"):
        cut(resnet(), ["layer1"], sample)


def test_a_sample_that_the_backbone_does_not_take_is_refused():
    with pytest.raises(CutError, match=r"ResNet itself does not run in eval mode on a sample of shape \(1, 1, 8, 8\)"):
        cut(resnet(), ["layer1"], torch.zeros(1, 1, 8, 8))


def test_a_cut_that_would_mistrace_is_found_by_the_check_and_traced_deeper(monkeypatch):
    """SelecSLS asks whether it was given a list, which a recorded value never is."""
    network, _, sample = make("selecsls")
    at = ["features.2.conv1.0"]
    assert torch.equal(cut(network, at, sample).eval()(sample), network.eval()(sample))
    monkeypatch.setattr(module_under_test, "DEPTHS", (0,))
    with pytest.raises(CutError):
        cut(network, at, sample)


# --- odd backbones


class Optional(nn.Module):
    """Optional arguments, a constant made in the forward, a plain tensor attribute, a shared and functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, times: int = 2, *, flip: bool = False) -> Tensor:
        x = self.act(self.conv(x)) * self.scale.view(1, -1, 1, 1)
        for _ in range(times):
            x = self.act(self.block(x))
        x = x + torch.tensor([0.5]) if mask is None else x * mask
        x = F.dropout(x, 0.5, self.training)
        return x.flip(-1) if flip else x.mean((2, 3))


def test_optional_arguments_keep_their_defaults_and_constants_leave_no_trace():
    network = Optional()
    sample = images(2, 8)
    stages = cut(network, ["conv", "block", "block.1"][:2], sample)
    assert not [name for name in vars(network) if "constant" in name]
    assert {name.partition(".")[2] for name in stages.state_dict()} == set(network.state_dict())
    for training in (True, False):
        torch.manual_seed(0)
        expected = copy.deepcopy(network).train(training)(sample)
        torch.manual_seed(0)
        assert torch.equal(copy.deepcopy(stages).train(training)(sample), expected)


def test_sizes_pass_no_cut_but_bind_the_stages_to_the_size_of_images():
    network = Shapes(whole=False).eval()
    stages = cut(network, ["conv", "last"], images(1, 8))
    assert stages.input_shape == (3, 8, 8)
    for batch in (1, 2, 5):
        assert torch.equal(stages(images(batch, 8)), network(images(batch, 8)))
    for run in (stages, lambda x: stages.features(x, at=["conv"]), copy.deepcopy(stages)):
        with pytest.raises(CutError, match=r"cut for inputs of shape \(3, 8, 8\), .*; got \(3, 4, 16\)"):
            run(torch.zeros(1, 3, 4, 16))
    free = cut(tv.resnet18(), ["layer1"], images())
    assert free.input_shape is None
    assert free(images(2, 96)).shape == (2, 1000)


def test_xcit_is_cut_though_sizes_pass_all_its_blocks():
    network = perturbed(timm.create_model("xcit_nano_12_p16_224", depth=3, img_size=64)).eval()
    stages = cut(network, ["blocks.0", "blocks.1"], images())
    assert torch.equal(stages(images(3)), network(images(3)))


def test_a_layer_called_twice_stands_for_its_last_call():
    network = Optional().eval()
    sample = images(2, 8)
    seen = []
    network.block.register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
    stages = cut(network, ["block"], sample)
    seen.clear()
    network(sample)
    assert len(seen) == 2
    assert torch.equal(stages.features(sample, at=["block"])["block"], seen[-1])


def test_constants_of_a_forward_move_with_the_stages():
    stages = cut(Optional(), ["conv"], images(2, 8)).to("meta")
    assert stages(torch.zeros(2, 3, 8, 8, device="meta")).shape == (2, 4)


def test_a_backbone_may_use_the_names_that_stages_use():
    network = nn.Sequential()
    for name in ("names", "features", "stage0", "inputs", "layouts"):
        network.add_module(name, nn.Conv2d(3, 3, 1))
    sample = images(1, 8)
    stages = cut(network, ["features", "inputs"], sample)
    assert torch.equal(stages(sample), network(sample))


def test_what_the_tracer_needs_of_fx_beyond_its_stable_interface_is_there():
    """``create_args_for_root``, ``module_stack`` and ``nn_module_stack`` are public names without torch's promise."""
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), Optional())
    tracer = StageTracer([], 99)
    graph = tracer.trace(network)
    assert [node.op for node in graph.nodes].count("placeholder") == 1
    node = next(node for node in graph.nodes if node.target == "mean")
    assert next(reversed(node.meta["nn_module_stack"].values()))[0] == "1"
    broken = StageTracer([], 99)
    with pytest.raises(CutError, match="branches on"):
        broken.trace(nn.Sequential(nn.Sequential(DataDependent())))
    assert next(reversed(broken.module_stack.values())) == ("0.0", DataDependent)
