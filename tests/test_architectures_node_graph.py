from __future__ import annotations

import copy
import pickle
import random
import warnings

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from cleave.architectures.cutting.node_graph import partition, trace_graph
from cleave.architectures.cutting.stages import CutError, cut
from cleave.architectures.macs import count_macs, count_params

tv = torchvision.models


def images(batch: int = 1, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def googlenet() -> nn.Module:
    """Three of its nine blocks of branches."""
    torch.manual_seed(0)
    network = tv.googlenet(aux_logits=False, init_weights=False, num_classes=10)
    for name in ("inception4b", "inception4c", "inception4d", "inception4e", "inception5a", "inception5b"):
        setattr(network, name, nn.Identity())
    network.fc = nn.Linear(512, 10)
    return network


def train_step(network: nn.Module, owner: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network.train()
    torch.manual_seed(5)
    out = network(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **found, **{f"buffer {name}": b for name, b in owner.named_buffers()}}


def check_parity(network: nn.Module, node_sets: list[list[str]], sample: Tensor) -> None:
    twin = copy.deepcopy(network)
    parts = partition(twin, node_sets, sample)
    batch = images(3, sample.shape[-1])
    with torch.no_grad():
        assert torch.equal(parts.eval()(batch), network.eval()(batch))
        assert torch.equal(parts.run(batch, isolated=True), network(batch))
    reference = copy.deepcopy(network)
    actual, expected = train_step(parts, twin, batch), train_step(reference, reference, batch)
    assert torch.equal(actual["out"], expected["out"])
    assert all(torch.equal(actual[name], expected[name]) for name in expected if name.startswith("buffer"))
    # Branches that run in another order add up their gradients in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_graph_names_layers_and_operations_and_states_what_they_cost():
    network = tv.resnet18()
    graph = trace_graph(network, images(2))
    nodes = {node.name: node for node in graph.nodes}
    assert list(nodes)[:11] == [
        *("conv1", "bn1", "relu", "maxpool", "layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu", "layer1.0.conv2"),
        *("layer1.0.bn2", "layer1.0/add", "layer1.0.relu:2"),
    ]
    add = nodes["layer1.0/add"]
    assert (add.inputs, add.shape, add.bytes, add.macs) == (("layer1.0.bn2", "maxpool"), (1, 64, 16, 16), 65536, 0)
    assert nodes["layer1.0.conv1"].macs == 64 * 64 * 9 * 16 * 16
    assert sum(node.macs for node in graph.nodes) == count_macs(network, images())
    assert sum(node.params for node in graph.nodes) == count_params(network)
    assert graph.outputs == ("fc",)
    edges = graph.edges()
    assert ("maxpool", "layer1.0/add", 65536) in edges
    assert ("input", "conv1", 4 * 3 * 64 * 64) in edges
    assert graph.input_shape == (3, 64, 64)
    assert (nodes["conv1"].kind, add.kind) == ("Conv2d", "add")
    assert {node.crosses for node in graph.nodes} == {"tensor"}
    order = {name: i for i, name in enumerate(["input", *nodes])}
    assert all(order[source] < order[target] for source, target, _ in edges)


def test_depth_bounds_how_far_modules_are_opened():
    network = tv.resnet18()
    names = [node.name for node in trace_graph(network, images(), depth=0).nodes]
    assert names == [*[name for name, _ in network.named_children()][:-1], "flatten", "fc"]
    names = [node.name for node in trace_graph(network, images(), depth=1).nodes]
    assert names[4:7] == ["layer1.0", "layer1.1", "layer2.0"]
    parts = partition(network, [names[:5], names[5:]], images(), depth=1)
    assert parts.inputs == (("input",), ("layer1.0",))


def test_parts_inside_a_residual_block_pass_two_named_tensors():
    network = tv.resnet18()
    names = [node.name for node in trace_graph(network, images()).nodes]
    middle = names.index("layer2.0.bn1") + 1
    parts = partition(network, [names[:middle], names[middle:]], images())
    assert parts.inputs == (("input",), ("layer1.1.relu:2", "layer2.0.bn1"))
    assert parts.outputs == (("layer1.1.relu:2", "layer2.0.bn1"),)
    check_parity(network, [names[:middle], names[middle:]], images())


def test_branches_of_googlenet_become_parts_of_their_own(googlenet):
    names = [node.name for node in trace_graph(googlenet, images()).nodes]
    left = [name for name in names if name.startswith(("inception3a.branch1", "inception3a.branch2"))]
    right = [name for name in names if name.startswith(("inception3a.branch3", "inception3a.branch4"))]
    before = names[: names.index(left[0])]
    after = [name for name in names if name not in {*before, *left, *right}]
    parts = partition(googlenet, [before, right, left, after], images())
    assert parts.inputs[1] == parts.inputs[2] == ("maxpool2",)
    assert len(parts.inputs[3]) == 4
    check_parity(googlenet, [before, right, left, after], images())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_any_division_along_the_edges_reproduces_the_network(googlenet, seed):
    nodes = trace_graph(googlenet, images()).nodes
    chance = random.Random(seed)
    part_of = {"input": 0}
    for node in nodes:
        earliest = max((part_of[source] for source in node.inputs), default=0)
        part_of[node.name] = min(earliest + (chance.random() < 0.2), 5)
    sets = [[node.name for node in nodes if part_of[node.name] == part] for part in range(max(part_of.values()) + 1)]
    sets = [names for names in sets if names]
    assert len(sets) > 2
    check_parity(googlenet, sets, images())


@pytest.mark.parametrize("end", ["stages.0.blocks.1/mul", "stages.0.blocks.1.conv_dw", "stages.1.blocks.0/add"])
def test_steps_of_training_alone_go_with_the_nodes_they_serve(end):
    """Drop-path is a dozen nodes in training and none in eval mode; the planner sees the latter."""
    network = timm.create_model("convnext_atto", depths=(2, 1, 1, 1), drop_path_rate=0.5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    names = [node.name for node in trace_graph(network, images()).nodes]
    middle = names.index(end) + 1
    check_parity(network, [names[:middle], names[middle:]], images())


def test_cut_is_the_front_with_one_tensor():
    network = tv.resnet18()
    names = [node.name for node in trace_graph(network, images()).nodes]
    middle = names.index("layer2.0.conv1")
    parts = partition(network, [names[:middle], names[middle:]], images()).eval()
    stages = cut(network, ["layer1"], images()).eval()
    feature = parts.part0(images())
    assert torch.equal(feature, stages[0](images()))
    assert torch.equal(parts.part1(feature), stages[1](feature))


def test_parts_share_parameters_keep_modes_and_can_be_copied_pickled_and_traced():
    network = tv.resnet18().train()
    network.layer2.eval()
    names = [node.name for node in trace_graph(network, images()).nodes]
    middle = names.index("layer2.0.bn1") + 1
    parts = partition(network, [names[:middle], names[middle:]], images())
    assert network.training
    assert not parts.part1.layer2.training
    assert not parts.part1.layer2.get_submodule("0").bn2.training
    own = {name: p.data_ptr() for name, p in network.named_parameters()}
    assert {name.partition(".")[2]: p.data_ptr() for name, p in parts.named_parameters()} == own
    expected = parts.eval()(images(2))
    for twin in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):  # noqa: S301
        assert torch.equal(twin(images(2)), expected)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch marks TorchScript deprecated; deployment wraps it
        passed = parts.part0(images())
        scripts = [
            torch.jit.trace(parts.part0, (images(),), check_trace=False),
            torch.jit.trace(parts.part1, passed, check_trace=False),
        ]
    torch.testing.assert_close(scripts[1](*scripts[0](images(2))), expected, rtol=1e-5, atol=1e-5)


class InPlace(nn.Module):
    """The second branch alters what the first one reads before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.reader = nn.Conv2d(3, 3, 1)
        self.writer = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.reader(x) + self.writer(x)


def test_an_order_in_which_an_in_place_layer_spoils_a_tensor_is_refused():
    network = InPlace()
    partition(network, [["conv"], ["reader"], ["writer", "add"]], images(1, 8))
    with pytest.raises(CutError, match="do not reproduce InPlace"):
        partition(network, [["conv"], ["writer"], ["reader", "add"]], images(1, 8))


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        return self.conv(x).view(-1, 3 * height, x.shape[3])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([["conv"], ["view"]], r"no part holds 'getattr', 'getitem'"),
        ([["conv"], ["vieww"]], r"part 1 names the unknown node 'vieww'\. Did you mean 'view'"),
        ([["conv", "view"], ["conv"]], "node 'conv' is in part 0 and in part 1"),
        ([["conv"], []], "part 1 is a set of node names and not empty"),
        (["conv", ["view"]], "part 0 is a set of node names and not empty; got 'conv'"),
    ],
)
def test_sets_that_do_not_divide_the_nodes_are_refused(sets, message):
    with pytest.raises(CutError, match=message):
        partition(Sizes(), sets, images(1, 8))


def test_order_and_values_that_cannot_pass_are_refused():
    names = [node.name for node in trace_graph(Sizes(), images(1, 8)).nodes]
    with pytest.raises(CutError, match=r"'view' in part 0 needs 'conv' of the later part 1"):
        partition(Sizes(), [[name for name in names if name != "conv"], ["conv"]], images(1, 8))
    with pytest.raises(
        CutError, match="part 0 would pass on 'getattr', which is no tensor: keep it in one part with 'get"
    ):
        partition(Sizes(), [["getattr"], [name for name in names if name != "getattr"]], images(1, 8))


def test_sizes_do_not_pass_but_bind_the_parts_to_the_size_of_images():
    names = [node.name for node in trace_graph(Sizes(), images(1, 8)).nodes]
    later = ["conv", "view"]
    parts = partition(Sizes(), [[name for name in names if name not in later], later], images(1, 8))
    assert parts.inputs == (("input",), ("input",))
    assert parts.input_shape == (3, 8, 8)
    assert parts(images(5, 8)).shape == (5, 24, 8)
    with pytest.raises(CutError, match=r"cut for inputs of shape \(3, 8, 8\), .*; got \(3, 4, 4\)"):
        parts(images(1, 4))
