"""Real networks: how many sets a device can hold, what the presets come to, and what planners find there."""

from __future__ import annotations

import functools

import pytest
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cleave.architectures import partition, trace_graph
from cleave.planning import (
    LayerGraph,
    Link,
    Machine,
    PlanOptions,
    every_plan,
    layer_graph,
    local,
    optimum,
    pareto,
    roofline,
    server,
)

from .training_helpers import ROOT

SETS = {
    "vgg16": 41,
    "efficientnet_b0": 88,
    "vit_b_16": 143,
    "resnet101": 410,
    "densenet121": 432,
    "googlenet": 8838,
}
pytestmark = pytest.mark.slow


@functools.cache
def graph_of(name: str) -> LayerGraph:
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    network = torchvision.models.get_model(name, weights=None, **more)
    return layer_graph(trace_graph(network, torch.zeros(1, 3, 224, 224)))


def machine(name: str) -> Machine:
    return instantiate(OmegaConf.load(ROOT / f"conf/machine/{name}.yaml"))


@pytest.mark.parametrize("name", SETS)
def test_the_sets_that_a_device_can_hold_are_few_and_all_are_looked_at(name):
    graph = graph_of(name)
    assert graph.closed_sets().shape[1] == SETS[name]
    device, away = roofline(graph.nodes, machine("jetson_xavier_nx")), roofline(graph.nodes, machine("rtx_a6000"))
    taken = (graph, device, Link(up=20, round_trip=0.005), away, PlanOptions(bits=8))
    plans = every_plan(*taken)
    assert pareto(*taken)[0].latency == plans["optimum (latency)"].latency
    assert plans["dads_light"].latency == pytest.approx(plans["optimum (latency)"].latency, rel=1e-9)


@pytest.mark.parametrize(("name", "milliseconds"), [("jetson_xavier_nx", 45), ("jetson_tx2", 57)])
def test_the_presets_take_about_as_long_as_coach_reports(name, milliseconds):
    assert roofline(graph_of("resnet101").nodes, machine(name)).total == pytest.approx(milliseconds / 1e3, rel=0.01)


@pytest.mark.parametrize("name", ["resnet101", "vgg16"])
def test_a_jpeg_is_best_sent_whole_from_10_megabits_on(name):
    graph = graph_of(name)
    device, away = roofline(graph.nodes, machine("jetson_xavier_nx")), roofline(graph.nodes, machine("rtx_a6000"))
    for rate in (10, 20, 50, 100):
        taken = (graph, device, Link(up=rate), away, PlanOptions(image="jpeg_imagenet"))
        whole = server(*taken)
        assert whole.latency < local(*taken).latency
        assert optimum(*taken).latency == pytest.approx(whole.latency)
    floats = (graph, device, Link(up=10), away, PlanOptions(image="float32"))
    assert server(*floats).latency > local(*floats).latency


def test_a_natural_cut_of_resnet_101_sends_50_kilobytes_at_4_bits():
    graph = graph_of("resnet101")
    smallest = min(
        PlanOptions(bits=4).value_bytes(graph.sent(members)[0].count)
        for members in graph.single_cuts().T
        if graph.sent(members)[0].name.startswith("layer")
    )
    assert smallest == 50_176


def test_plans_with_several_tensors_are_partitions_of_googlenet():
    network = torchvision.models.googlenet(aux_logits=False, init_weights=False, num_classes=10)
    sample = torch.randn(1, 3, 64, 64)
    graph = layer_graph(trace_graph(network, sample))
    device, away = roofline(graph.nodes, machine("jetson_xavier_nx")), roofline(graph.nodes, machine("rtx_a6000"))
    found = [
        plan
        for rate in (0.5, 1, 2, 5, 10)
        for plan in pareto(graph, device, Link(up=rate), away, PlanOptions(bits=8, answer=0))
        if plan.tensors > 1
    ]
    assert found
    for plan in found[:2]:
        parts = partition(network, [plan.device_nodes, plan.server_nodes], sample)
        assert sorted(parts.outputs[0]) == sorted(each.name for each in plan.sent)
