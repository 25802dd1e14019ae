"""A cut against the uncut network, seed by seed: outputs, gradients, buffers and random draws, or a refusal."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cleave.architectures import CutError, cut, cut_points, partition, split_network, trace_graph
from cleave.architectures.cutting.draws import random_state
from cleave.architectures.cutting.recording import StageTracer
from cleave.deployment.bundle.torchscript import load_torchscript, save_torchscript

FILE = Path(__file__).parents[1] / "benchmarks/user_networks.py"
spec = importlib.util.spec_from_file_location("user_networks", FILE)
users = sys.modules["user_networks"] = importlib.util.module_from_spec(spec)
with warnings.catch_warnings(action="ignore"):  # torch marks TorchScript deprecated
    spec.loader.exec_module(users)
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs", "ignore:The .grad attribute", "ignore:.torch.jit")
EXACT = [name for name, build in users.NETWORKS.items() if build.refused is None]
REFUSED = [name for name, build in users.NETWORKS.items() if build.refused is not None]
UNPICKLED = ("HookOnLayer", "ScriptedLayer", "Normalised")  # nor are they uncut
# Networks whose every listed point is cut in `make test`: one of each thing that a stage may hold or refuse.
LISTED = {
    *(
        "StraightThrough",
        "MixedPrecision",
        "FrozenMiddle",
        "Checkpointed",
        "StepCounter",
        "GaussianNoise",
        "DiceInABlock",
    ),
    *("Functional", "Residuals", "Tied", "ReturnsPair", "DroppedLayer", "CutInCheckpoint", "Dense", "Remembering"),
    *UNPICKLED,
}


def listing(names: list[str]) -> list[object]:
    return [name if name in LISTED else pytest.param(name, marks=pytest.mark.slow) for name in names]


def listed(network: nn.Module, sample: Tensor) -> list[str]:
    try:
        return [point.name for point in cut_points(network, sample)]
    except CutError:
        return []


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        network = users.NETWORKS[name]()
    return network, network.sample()


def step(run: nn.Module, owner: nn.Module, sample: Tensor, seed: int, training: bool = True) -> dict[str, object]:
    """One forward and backward pass; everything that it leaves behind."""
    run.train(training), owner.train(training)
    owner.zero_grad()
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
    leaf = sample.clone().requires_grad_(sample.is_floating_point())
    result = run(leaf)
    tensors = list(result.values()) if isinstance(result, dict) else [result] if isinstance(result, Tensor) else result
    sum(each.square().sum() for each in tensors).backward()
    gradients = {name: weight.grad for name, weight in owner.named_parameters()}
    return {"result": result, "input": leaf.grad, "gradients": gradients, "buffers": dict(owner.named_buffers())} | {
        "draws": random_state()
    }


@pytest.mark.parametrize("name", EXACT)
def test_a_cut_equals_the_network_seed_by_seed(name):
    network, sample = build(name)
    twin, _ = build(name)  # a copy of what is scripted would not learn
    stages = cut(twin, network.at, sample)
    for seed in range(2):
        twin.load_state_dict(network.state_dict())
        for training in (True, False):
            actual, expected = (step(*each, sample, seed, training) for each in ((stages, twin), (network, network)))
            assert actual.pop("draws") == expected.pop("draws")
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cut_would_lose_is_refused_with_its_line_and_a_way_out(name):
    network, sample = build(name)
    state = copy.deepcopy(network.state_dict())
    before = random_state()
    with pytest.raises(CutError, match=network.refused) as caught:
        cut(network, network.at, sample)
    assert "\n" not in str(caught.value)
    assert random_state() == before
    torch.testing.assert_close(dict(network.state_dict()), dict(state), rtol=0, atol=0)
    assert not any(isinstance(value, torch.fx.Proxy) for m in network.modules() for value in vars(m).values())


@pytest.mark.parametrize("name", listing(REFUSED))
def test_a_listed_point_of_what_is_refused_elsewhere_is_accepted(name):
    network, sample = build(name)
    for name in listed(network, sample):
        cut(network, [name], sample)


@pytest.mark.parametrize("name", listing(EXACT))
def test_a_listed_point_is_accepted_and_copies_compute_the_same(name):
    network, sample = build(name)
    network.eval()
    pickled = name not in UNPICKLED
    for name in listed(network, sample)[::3]:
        stages = cut(network, [name], sample).eval()
        torch.manual_seed(3)
        expected = network(sample)
        for copied in (copy.deepcopy(stages), pickle.loads(pickle.dumps(stages)) if pickled else stages):  # noqa: S301
            torch.manual_seed(3)
            torch.testing.assert_close(copied(sample), expected, rtol=0, atol=0)


def test_there_are_forty_networks():
    assert len(users.NETWORKS) >= 40


def test_a_frozen_backbone_keeps_gradients_of_what_is_trained_later():
    network, sample = build("StraightThrough")
    network.requires_grad_(False)
    stages = cut(network, ["a"], sample)
    assert not any(weight.requires_grad for weight in network.parameters())
    network.a.requires_grad_(True)
    stages.train()(sample).sum().backward()
    assert all(weight.grad is not None for weight in network.a.parameters())


def test_an_outer_context_still_holds_around_the_stages():
    network, sample = build("MixedPrecision")
    stages = cut(network, ["a", "b"], sample)
    with torch.no_grad():
        assert not stages(sample).requires_grad
    network, sample = build("Tied")
    stages = cut(network, ["a"], sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stages(sample).dtype == torch.bfloat16
    with torch.inference_mode():
        assert stages(sample).is_inference()


def test_an_error_inside_a_context_leaves_gradients_on():
    network, sample = build("FrozenStem")
    stages = cut(network, ["a"], sample)
    with pytest.raises(RuntimeError):
        stages(sample[:, :2])
    assert torch.is_grad_enabled()


def test_gradient_checkpointing_of_timm_is_refused_with_its_switch():
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3)
    network.set_grad_checkpointing()
    sample = torch.randn(1, 3, 32, 32)
    with pytest.raises(CutError, match="switch gradient checkpointing off"):
        cut(network, ["blocks.0"], sample)
    network.set_grad_checkpointing(False)
    cut(network, ["blocks.0"], sample)


def test_each_point_that_tnt_lists_is_accepted():
    network = timm.create_model("tnt_s_patch16_224", img_size=32, depth=2)
    sample = torch.randn(1, 3, 32, 32)
    points = cut_points(network, sample)
    assert [cut(network, [point.name], sample).names for point in points] == [(point.name,) for point in points]


def test_parts_of_a_graph_keep_gradients_too():
    network, sample = build("FrozenStem")
    graph = trace_graph(network, sample, depth=0)
    names = [node.name for node in graph.nodes]
    twin = copy.deepcopy(network)
    parts = partition(twin, [names[:2], names[2:]], sample, depth=0)
    actual, expected = step(parts, twin, sample, 0), step(network, network, sample, 0)
    torch.testing.assert_close(actual["gradients"], expected["gradients"])


class AltersLater(nn.Module):
    """A buffer that the first part reads and the second alters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.register_buffer("level", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x * self.level))
        if self.training:
            self.level.mul_(0.5)
        return x


def test_state_that_two_parts_share_is_refused():
    with pytest.raises(CutError, match="alters a parameter or buffer that another part reads"):
        cut(AltersLater(), ["a"], torch.randn(1, 3, 4, 4))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(x if self.training and torch.rand(1).item() < 0.5 else 2 * x)


def test_a_module_that_no_cut_lies_in_may_do_what_it_likes():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Inner(), nn.Sequential(Inner(), nn.ReLU()))
    sample = torch.randn(2, 3, 4, 4)
    twin = copy.deepcopy(network)
    stages = cut(twin, ["0", "1", "2.0"], sample)
    for seed in range(6):
        actual, expected = step(stages, twin, sample, seed), step(network, network, sample, seed)
        torch.testing.assert_close(actual["gradients"], expected["gradients"])
    with pytest.raises(CutError, match="in the forward of '1' branches on a random draw"):
        cut(network, ["1.conv"], sample)


class InnerCheckpoint(nn.Module):
    """Checkpoints by a method, which only stands in the way of a cut inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)

    def inner(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_checkpointed_batch_norms_move_as_often_as_they_do_uncut():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), InnerCheckpoint())
    sample = torch.randn(2, 3, 4, 4)
    twin = copy.deepcopy(network)
    stages = cut(twin, ["0"], sample)
    actual, expected = step(stages, twin, sample, 0), step(network, network, sample, 0)
    torch.testing.assert_close(actual["buffers"], expected["buffers"], rtol=0, atol=0)
    assert int(expected["buffers"]["1.conv.1.num_batches_tracked"]) == 2


def test_a_scripted_layer_is_refused_where_a_copy_is_trained():
    network, sample = build("ScriptedLayer")
    with pytest.raises(CutError, match="layer 'c' of ScriptedLayer is scripted, and a copy of it would not learn"):
        split_network(network, "b", sample, form="insert")


class RoundLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return users.RoundFunction.apply(4 * x) / 4


@pytest.mark.parametrize("at", ["0", "1"])
def test_functions_with_a_backward_of_their_own_are_exported(at, tmp_path):
    network, sample = build("GradientReversal")
    network = nn.Sequential(network.a, RoundLayer(), network)
    network[2].a = nn.Conv2d(8, 8, 1)
    stages = cut(network, [at, "2.b"], sample).eval()
    for i, stage in enumerate(stages):
        with torch.no_grad():
            save_torchscript(stage, [sample], tmp_path / "stage.pt")
            expected = stage(sample)
            torch.testing.assert_close(load_torchscript((tmp_path / "stage.pt").read_bytes())(sample), expected)
        sample = expected
        assert i < 3
    assert "apply" not in vars(users.ReverseFunction)


def test_what_is_patched_while_a_forward_is_recorded_is_put_back():
    before = (torch.utils.checkpoint._checkpoint_without_reentrant_generator, nn.Module.__setattr__)
    forwards = [vars(users.RoundFunction)["forward"], vars(users.ReverseFunction)["setup_context"]]
    for tracer in (StageTracer([], 99), StageTracer([], 99)):
        tracer.trace(build("StraightThrough")[0])
        with pytest.raises(CutError):
            tracer.trace(build("BranchOnValue")[0])
    assert before == (torch.utils.checkpoint._checkpoint_without_reentrant_generator, nn.Module.__setattr__)
    assert forwards == [vars(users.RoundFunction)["forward"], vars(users.ReverseFunction)["setup_context"]]
    assert not any("stage" in str(name) for _, name in torch.fx._symbolic_trace._wrapped_fns_to_patch)
