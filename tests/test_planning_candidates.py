"""Trained networks as plans."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from cleave.architectures import create_backbone, staged_network
from cleave.deployment import ENVELOPE_BYTES
from cleave.planning import Candidate, Link, PlanOptions, candidate_plan, layer_graph, local, roofline, server
from cleave.planning.profiles.machine import Machine, Power
from cleave.reports.rates.results import Point, write_results
from cleave.scripts.assembly.planning import trained
from cleave.scripts.assembly.planning.trained import device_and_server_macs, payload_of, read_candidates

from .planning_graphs import random_graph

LINK = Link(up=8.0, down=4.0, round_trip=0.2)


@pytest.fixture(scope="module")
def problem():
    nodes = random_graph(random.Random(2), 6, several=False)
    nodes = dataclasses.replace(nodes, nodes=tuple(dataclasses.replace(node, macs=1000) for node in nodes.nodes))
    machine = Machine("device", rate=1e6, bandwidth=1e12, power=Power(1, 2, 3))
    device, away = roofline(nodes, machine), roofline(nodes, dataclasses.replace(machine, rate=1e7, power=None))
    return layer_graph(nodes), device, LINK, away, PlanOptions(answer=1000)


def test_a_candidate_is_timed_at_the_pace_of_each_machine(problem):
    graph, device, _, away, _ = problem
    plan = candidate_plan(Candidate("a", 1500, 4500, 2000.0, accuracy=0.9), *problem)
    assert plan.stages == pytest.approx((device.total / 4, 0.002, away.total * 0.75, 0.002))
    assert plan.delay == pytest.approx(0.2)
    assert (plan.bytes, plan.accuracy, plan.exact) == (2000, 0.9, False)
    assert plan.energy == pytest.approx(2 * plan.stages[0] + 3 * plan.stages[1] + sum(plan.stages[2:]) + plan.delay)
    whole = candidate_plan(Candidate("all", 6000, 0, 0.0, sent_share=0.0), *problem)
    assert whole.latency == pytest.approx(local(*problem).latency)
    assert graph.layers


def test_who_leaves_on_the_device_sends_nothing_and_waits_for_nothing(problem):
    half = candidate_plan(Candidate("a", 1500, 2250, 1000.0, sent_share=0.5, shares={"layer1": 0.5}), *problem)
    full = candidate_plan(Candidate("a", 1500, 4500, 2000.0), *problem)
    assert half.stages[1:] == pytest.approx(tuple(each / 2 for each in full.stages[1:]))
    assert half.delay == full.delay / 2
    assert "50% leave at layer1" in half.why


def test_where_the_server_is_not_known_it_takes_at_most_the_whole_network(problem):
    plan = candidate_plan(Candidate("a", 1500, None, 2000.0), *problem)
    assert plan.stages.server == pytest.approx(server(*problem).stages.server)
    assert "at most as long as the whole network" in plan.why


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device_macs": -1}, "device_macs of a must be at least 0"),
        ({"server_macs": -1}, "server_macs of a must be at least 0"),
        ({"payload": -1.0}, "payload of a must be at least 0"),
        ({"sent_share": 1.5}, "sent_share of a is a share of the samples, at most 1"),
        ({"shares": {"layer1": -0.5}}, "layer1 of a must be at least 0"),
    ],
)
def test_a_candidate_out_of_range_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(Candidate("a", 1, 1, 1.0), **change)


def test_a_network_without_work_has_no_pace(problem):
    nodes = dataclasses.replace(
        problem[0].nodes, nodes=tuple(dataclasses.replace(node, macs=0) for node in problem[0].nodes.nodes)
    )
    profile = roofline(nodes, Machine("device", rate=1e6, bandwidth=1e6))
    with pytest.raises(ValueError, match="the network's work must be above 0"):
        candidate_plan(Candidate("a", 1, 1, 1.0), layer_graph(nodes), profile, LINK, profile, PlanOptions())


def test_a_networks_costs_are_divided_where_it_sends_and_its_payload_is_real():
    backbone = create_backbone("cifar", "resnet20", num_classes=10).network
    images = torch.rand(2, 3, 32, 32)
    more = {"exits": ["layer1"], "bottleneck": {"channels": 4}, "codec": {"bits": 4}}
    network = staged_network(backbone, images, split="layer2", form="insert", **more).eval()
    costs = {(cost.name, cost.kind): cost.macs for cost in network.costs()}
    device, away = device_and_server_macs(network)
    on_the_device = [("layer1", "stage"), ("layer1", "exit"), ("layer2", "stage"), ("layer2", "encoder")]
    assert device == sum(costs[each] for each in on_the_device)
    assert device + away == sum(costs.values())
    values = network.outputs(images[:1], ["layer2/z"])["layer2/z"].numel()
    assert payload_of(network) == ENVELOPE_BYTES + values // 2  # at 4 bits
    assert payload_of(staged_network(backbone, images)) == 0


def test_results_of_other_backbones_are_left_out_and_said(tmp_path, capsys):
    points = [Point("HND", name, 0.8, 100.0, encoder_macs=10, backbone=name) for name in ("resnet20", "resnet56")]
    write_results(tmp_path / "results.json", points)
    (only,) = read_candidates([str(tmp_path)], "resnet20", trusted=False)
    assert (only.name, only.device_macs, only.server_macs, only.payload) == ("HND: resnet20", 10, None, 100.0)
    assert "results of resnet56 are left out, as resnet20 is planned" in capsys.readouterr().out
    points = [Point("HND", "4 bits", 0.8, 100.0, encoder_macs=macs, backbone="resnet20") for macs in (10, None)]
    write_results(tmp_path / "results.json", points)
    (tmp_path / "jpeg").mkdir()
    baseline = [Point("JPEG", "quality 50", 0.9, 700.0, backbone="resnet20")]
    write_results(tmp_path / "jpeg/results.json", baseline, kind="baseline")
    jpeg, hnd = read_candidates([str(tmp_path)], "resnet20", trusted=False)
    assert (hnd.device_macs, jpeg.device_macs) == (10, 0)
    assert "HND: 4 bits is left out, as nobody counted its encoder_macs" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"write candidates=\[logs\]"):
        read_candidates("logs", "resnet20", trusted=False)


def test_networks_of_one_name_are_told_apart_and_a_file_that_is_met_twice_counts_once(tmp_path):
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        write_results(tmp_path / f"{seed}/results.json", [Point("HND", "4 bits", 0.8, 10.0 * seed, encoder_macs=5)])
    given = [str(tmp_path), str(tmp_path / "1/results.json"), str(tmp_path / "2")]
    found = read_candidates(given, "resnet20", trusted=False)
    assert [(each.name, each.payload) for each in found] == [("HND: 4 bits", 10.0), ("HND: 4 bits #2", 20.0)]


def test_a_path_through_two_networks_is_left_out_whatever_file_it_is_in(tmp_path, capsys, monkeypatch):
    file = tmp_path / "results.json"
    write_results(file, [Point("path", "0-1-4-5", 0.8, 10.0, encoder_macs=5)], path={"seconds": 1.0})
    assert read_candidates([str(file)], "resnet20", trusted=False) == []
    bundle = SimpleNamespace(config={"links": {"path": [0, 1, 4, 5]}, "backbone": {"name": "resnet20"}})
    monkeypatch.setattr(trained, "read_manifest", lambda _: bundle)
    assert trained.of_bundle(tmp_path, "resnet20") == []
    assert capsys.readouterr().out.count("a path through two networks is left out, as search_paths.py plans those") == 2
