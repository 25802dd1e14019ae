"""Profiles that are measured here, and those that are predicted from them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from cleave.architectures import trace_graph, visit_nodes
from cleave.planning import (
    HeldOut,
    Machine,
    Profile,
    fit_regression,
    graph_digest,
    held_out_error,
    measure_profile,
    roofline,
)


class InPlace(nn.Module):
    """A forward that works in place on what it reads, and reads sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.one(x) - 0.5)
        y += 1
        return self.two(y.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return InPlace().train()


def test_every_node_is_a_call_that_gives_the_same_however_often_it_runs(network):
    images, seen = torch.randn(2, 3, 4, 4), {}

    def visit(name, call):
        seen[name] = [call() for _ in range(3)]

    visit_nodes(network, images, visit)
    assert list(seen) == [node.name for node in trace_graph(network, images).nodes]
    answers = network.eval()(images)
    network.train()
    assert all(torch.equal(answer, answers) for answer in seen["two"])
    assert all(torch.equal(value, seen["one"][0]) for value in seen["one"])


def test_a_measured_profile_has_a_time_for_every_node_and_for_the_whole(network):
    images = torch.randn(2, 3, 4, 4)
    graph = trace_graph(network, images)
    profile = measure_profile(network, graph, images, node_seconds=1e-4, threads=1, machine="mine")
    assert set(profile.seconds) == {node.name for node in graph.nodes}
    assert all(profile.seconds[node.name] > 0 for node in graph.nodes if node.shape is not None)
    assert (profile.machine, profile.how, profile.threads, profile.batch) == ("mine", "measured", 1, 2)
    assert profile.whole is not None
    assert profile.whole > 0
    assert profile.check(graph) is profile
    assert network.training  # as it was


def test_what_cannot_be_measured_is_refused(network):
    graph = trace_graph(network, torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"images are \(3, 4, 6\), the graph is one of \(3, 4, 4\)"):
        measure_profile(network, graph, torch.randn(1, 3, 4, 6))
    with pytest.raises(ValueError, match="empty batch"):
        measure_profile(network, graph, torch.randn(0, 3, 4, 4))
    for given, words in (({"node_seconds": 0}, "node_seconds must be above 0"), ({"threads": 0}, "threads must be")):
        with pytest.raises(ValueError, match=words):
            measure_profile(network, graph, torch.randn(1, 3, 4, 4), **given)


# --- regressions ------------------------------------------------------------------------------------------------------

TOY = Machine("toy", rate=1e6, bandwidth=1e15, launch=1e-3)


@pytest.fixture(scope="module")
def chains():
    """Two networks of linear layers and activations with the times of a roofline."""
    found = []
    for step in (32, 48):
        sizes = range(step, 12 * step, step)
        layers = [each for n in sizes for each in (nn.Linear(n, n + step), nn.ReLU())]
        graph = trace_graph(nn.Sequential(*layers), torch.zeros(1, step))
        found.append((graph, roofline(graph, TOY)))
    return found


def test_a_regression_recovers_times_that_are_linear_and_predicts_another_network(chains):
    (first, times), (second, wanted) = chains
    fitted = fit_regression([(first, times)])
    constant, by_macs, by_bytes = fitted.coefficients["Linear"]
    assert (constant, by_macs) == pytest.approx((1e-3, 2e-6), rel=1e-6)
    assert by_bytes == pytest.approx(0, abs=1e-12)
    assert fitted.coefficients["ReLU"] == pytest.approx((1e-3, 0, 0), rel=1e-6, abs=1e-9)
    predicted = fitted.predict(second)
    assert predicted.seconds == pytest.approx(dict(wanted.seconds), rel=1e-6)
    assert (predicted.how, predicted.machine) == ("regression", "toy")
    assert predicted.check(second) is predicted


def test_layers_that_are_held_out_are_predicted_from_the_others(chains):
    found = held_out_error(chains)
    assert found.median < 1e-6
    assert abs(found.total) < 1e-6
    assert found.layers == sum(len(graph.nodes) for graph, _ in chains)
    noisy = []
    for graph, profile in chains:
        uneven = {name: each * (1 + 0.5 * (-1) ** (i // 2)) for i, (name, each) in enumerate(profile.seconds.items())}
        noisy.append((graph, dataclasses.replace(profile, seconds=uneven)))
    assert held_out_error(noisy).median > found.median
    assert isinstance(found, HeldOut)


def test_types_that_were_not_seen_share_what_all_have_in_common(chains):
    fitted = fit_regression(chains)
    assert "Conv2d" not in fitted.coefficients
    assert fitted.seconds("Conv2d", 1000, 10.0) == pytest.approx(fitted.seconds("Linear", 1000, 10.0), rel=1e-3)
    assert fitted.seconds("GELU", 0, 10.0) == pytest.approx(1e-3, rel=1e-6)
    assert fitted.seconds("size", 0, 0, works=False) == 0


def test_coefficients_are_never_negative(chains):
    graph, profile = chains[0]
    falling = {node.name: 1.0 / (i + 1) for i, node in enumerate(graph.nodes)}
    fitted = fit_regression([(graph, dataclasses.replace(profile, seconds=falling))])
    assert all(each >= 0 for kind in fitted.coefficients.values() for each in kind)


def test_what_cannot_be_fitted_is_refused(chains):
    graph, profile = chains[0]
    other = dataclasses.replace(chains[1][1], machine="another")
    with pytest.raises(ValueError, match="measured is empty"):
        fit_regression([])
    with pytest.raises(ValueError, match="one of a single machine, got profiles of another, toy"):
        fit_regression([(graph, profile), (chains[1][0], other)])
    with pytest.raises(ValueError, match="another network"):
        fit_regression([(graph, chains[1][1])])
    with pytest.raises(ValueError, match="every time of the profiles is 0"):
        fit_regression([(graph, Profile("toy", graph_digest(graph), dict.fromkeys(profile.seconds, 0.0)))])
    for folds, words in ((1, "folds must be a whole number of at least 2"), (1000, "folds=1000 are more than")):
        with pytest.raises(ValueError, match=words):
            held_out_error(chains, folds)
