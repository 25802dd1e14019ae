"""A network as layers that can be placed freely, and all the sets of them that a device can hold."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from cleave.architectures import partition, trace_graph
from cleave.architectures.cutting.node_graph import GraphNode, NodeGraph
from cleave.planning import TooManySetsError, closed_sets, graph_digest, layer_graph

from .planning_graphs import by_hand, random_case, random_graph


class Sized(nn.Module):
    """A forward with sizes, a tuple of tensors, a token that depends on the batch alone, and two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.token, self.head = nn.Parameter(torch.zeros(1, 1, 2)), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        a, b = self.stem(x).chunk(2, 1)
        y = (self.one(a) + self.two(b)).reshape(batch, 2, height * width).permute(0, 2, 1)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1)
        return self.head(y.mean(1))


@pytest.fixture(scope="module")
def sized() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Sized(), torch.randn(1, 3, 4, 4)


def test_every_closed_set_is_a_division_that_partition_makes_and_passes_what_the_graph_says(sized):
    network, sample = sized
    graph = layer_graph(trace_graph(network, sample))
    sets = graph.closed_sets()
    assert sets.shape[1] > len(graph.layers) + 1  # the branches can be divided
    for members in sets.T[1:-1]:
        sides = graph.sides(members)
        parts = partition(network, list(sides), sample)
        assert set(parts.outputs[0]) == {value.name for value in graph.sent(members)} - {"input"}
        assert ("input" in parts.inputs[1]) == ("input" in {value.name for value in graph.sent(members)})


def test_what_holds_no_tensor_goes_with_what_it_is_computed_from(sized):
    nodes = trace_graph(*sized)
    crossing = {node.name: node.crosses for node in nodes.nodes}
    assert crossing["chunk"] == "never"
    assert {kind for name, kind in crossing.items() if name.startswith("getitem")} == {"tensor", "folded"}
    graph = layer_graph(nodes)
    groups = [set(layer.nodes) for layer in graph.layers]
    tensors = {node.name for node in nodes.nodes if "chunk" in node.inputs}
    assert len(tensors) == 2
    assert {"chunk", *tensors} in groups
    assert "getattr" in graph.free  # the images' own shape
    held = [name for layer in graph.layers for name in layer.nodes]
    assert sorted([*held, *graph.free]) == sorted(node.name for node in nodes.nodes)


def test_a_vision_transformer_has_one_set_a_tensor_and_the_empty_one():
    network = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    nodes = trace_graph(network, torch.zeros(1, 3, 32, 32))
    tensors = sum(node.shape is not None for node in nodes.nodes)
    assert len(nodes.nodes) > tensors + 10
    assert layer_graph(nodes).closed_sets().shape == (tensors, tensors + 1)


def test_enumeration_equals_brute_force_over_all_subsets():
    for seed in range(500):
        case = random_case(seed)
        names = [layer.name for layer in case.graph.layers]
        sets = case.graph.closed_sets()
        found = [frozenset(n for n, here in zip(names, members, strict=True) if here) for members in sets.T]
        assert len(set(found)) == len(found)
        assert set(found) == {division.held for division in by_hand(case)}
        assert not sets[:, 0].any()
        assert sets[:, -1].all()


def test_a_tensor_that_several_nodes_read_crosses_once_and_the_images_where_the_server_needs_them():
    node = lambda name, *inputs: GraphNode(name, inputs, (1, 10), 40, 0, 0)  # noqa: E731
    made = (node("a", "input"), node("b", "a"), node("c", "a"), node("d", "b", "c", "input"))
    nodes = NodeGraph(made, ("d",), (3, 8, 8))
    graph = layer_graph(nodes)
    sent = lambda *held: [value.name for value in graph.sent(np.isin(["a", "b", "c", "d"], held))]  # noqa: E731
    assert sent() == ["input"]
    assert sent("a") == ["input", "a"]
    assert sent("a", "b") == ["input", "a", "b"]
    assert sent("a", "b", "c", "d") == []
    assert graph.images.count == 192


def test_single_cuts_are_the_closed_sets_that_one_tensor_crosses():
    for seed in range(200):
        case = random_case(seed)
        graph = case.graph
        wanted = {
            tuple(members)
            for members in graph.closed_sets().T
            if members.any()
            and len(sent := graph.sent(members)) == 1
            and sent[0].name != "input"
            # Nodes that nothing reads could be added without a change; the smallest set stands for them.
            and tuple(members) == tuple(graph.closure([sent[0].layer]))
        }
        assert {tuple(members) for members in graph.single_cuts().T} == wanted


def test_more_sets_than_the_limit_are_refused_in_words_before_they_are_enumerated():
    wide = [[], *([0] for _ in range(40))]
    with pytest.raises(TooManySetsError, match=r"more than limit=1,000 sets.*min-cut"):
        closed_sets(wide, 1000)
    assert closed_sets(wide[:9], 257).shape == (9, 257)
    with pytest.raises(TooManySetsError):
        closed_sets(wide[:9], 256)
    for limit in (0, 1.5, True):
        with pytest.raises(ValueError, match="limit must be a whole number"):
            closed_sets(wide, limit)


@pytest.mark.parametrize("needs", [[[1], [0]], [[0]], [[], [-1]]])
def test_a_node_that_needs_a_later_one_is_refused(needs):
    with pytest.raises(ValueError, match="needs earlier ones only"):
        closed_sets(needs, 10)


def test_a_smaller_limit_holds_after_a_larger_one():
    graph = random_case(3).graph
    graph.closed_sets()
    with pytest.raises(TooManySetsError):
        graph.closed_sets(2)


def test_too_many_sets_are_counted_once(monkeypatch):
    graph = random_case(3).graph
    with pytest.raises(TooManySetsError) as first:
        graph.closed_sets(2)
    monkeypatch.setattr("cleave.planning.graphs.layer_graph.closed_sets", lambda *_: pytest.fail("counted again"))
    with pytest.raises(TooManySetsError) as second:
        graph.closed_sets(2)
    assert str(first.value) == str(second.value)


def test_the_digest_tells_networks_and_input_sizes_apart(sized):
    network, sample = sized
    nodes = trace_graph(network, sample)
    assert graph_digest(nodes) == graph_digest(copy.deepcopy(nodes))
    others = [trace_graph(network, torch.zeros(1, 3, 4, 6)), random_graph(random.Random(1), 5)]
    assert len({graph_digest(each) for each in [nodes, *others]}) == 3


def test_a_network_without_nodes_is_refused():
    with pytest.raises(ValueError, match="no node"):
        layer_graph(NodeGraph((), (), (3, 8, 8)))
