from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from cleave.architectures import (
    MagnitudeNullification,
    StagedNetwork,
    cut_blocks,
    every_path,
    link_blocks,
    linked_network,
    staged_network,
)
from cleave.lightning_modules import Frozen, Links, Term, TwoParties
from cleave.lightning_modules.linking.parties import Absent
from cleave.losses import HeadDistillationLoss, KnowledgeDistillationLoss

from .linked_networks import (
    HOST_BLOCKS,
    HOST_SAMPLE,
    LOCAL_BLOCKS,
    LOCAL_SAMPLE,
    Host,
    Local,
    host_blocks,
    images,
    labels,
    local_blocks,
    seeded,
)
from .tiny_networks import made_once


def task_of(path, **settings) -> Links:
    torch.manual_seed(7)
    network = link_blocks(local_blocks(), host_blocks(), path, settings.pop("links", None), **settings)
    return Links(network, loss=nn.CrossEntropyLoss(), evaluators=[])


def state(*modules):
    return [value.clone() for module in modules for value in module.state_dict().values()]


def step(task: Links, rate: float = 0.1) -> dict[str, torch.Tensor]:
    """Train a step as the trainer would; return the losses."""
    task.set_modes()
    losses = task.training_loss({"images": images(), "labels": labels()})
    torch.stack(list(losses.values())).sum().backward()
    torch.optim.SGD(task.parameter_groups(), lr=rate).step()
    return losses


PATHS = list(every_path(6, 6))


def test_there_are_as_many_paths_as_brute_force_finds():
    cross = [r for r in itertools.product(range(6), repeat=4) if r[0] < r[3] and r[1] <= r[2]]
    skips = [(a, None, None, b) for a, b in itertools.product(range(6), repeat=2) if a + 1 < b]
    assert (len(cross), len(skips)) == (315, 10)
    assert set(PATHS) == {*cross, *skips}
    assert len(PATHS) == 325


@pytest.mark.parametrize(
    ("lout", "every"), [(1, 4), *(pytest.param(lout, 1, marks=pytest.mark.slow) for lout in range(5))]
)
def test_every_path_trains_its_links_and_nothing_else(lout, every):
    local, host = local_blocks(), host_blocks()
    before = state(local.stages, host.stages)
    with torch.no_grad():
        outputs = host.stages.eval()(HOST_SAMPLE), local.stages.eval()(images())
    paths = [each for each in PATHS if each.lout == lout]
    for path in dict.fromkeys([*(each for each in paths if each.skips), *paths[::every]]):
        task = task_of(path)
        network, arrives = task.network, f"local/b{path.lout}/input"
        seen = network.outputs(images(), [arrives, "logits"])
        assert seen[arrives].grad_fn is None, path
        assert not seen[arrives].requires_grad, path
        assert seen["logits"].requires_grad, path
        first = [weight.clone() for link in network.links.values() for weight in link.parameters()]
        losses = step(task)
        assert all(torch.isfinite(value) for value in losses.values())
        learned = {name for name, weight in network.named_weights() if weight.grad is not None}
        assert learned == {name for name, _ in network.named_weights() if ".link." in name}, path
        now = [weight for link in network.links.values() for weight in link.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(first, now, strict=True)), path
        assert len(network.links) == (1 if path.skips else 2)
    assert all(torch.equal(a, b) for a, b in zip(before, state(local.stages, host.stages), strict=True))
    with torch.no_grad():
        again = host.stages.eval()(HOST_SAMPLE), local.stages.eval()(images())
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


# --- the method -------------------------------------------------------------------------------------------------------


def teacher() -> Frozen:
    return Frozen(made_once(_teacher, {}))


def _teacher(settings) -> StagedNetwork:
    return staged_network(seeded(Local), LOCAL_SAMPLE, cuts=LOCAL_BLOCKS)


def test_terms_compare_with_the_local_network_as_a_whole():
    network = link_blocks(local_blocks(), host_blocks(), [0, 1, 3, 4])
    task = Links(
        network,
        loss=nn.CrossEntropyLoss(),
        distillation=KnowledgeDistillationLoss(alpha=0.0),
        feature=HeadDistillationLoss(),
        feature_weight=0.1,
        others={"teacher": teacher()},
        evaluators=[],
    )
    assert task.asked == {"student": ("logits", "host/layer3"), "teacher": ("logits", "b3")}
    task.set_modes()
    losses = task.training_loss({"images": images(), "labels": labels()})
    local = local_blocks().stages.features(images(), ["b3", "logits"])
    found = network.outputs(images(), ["host/layer3", "logits"])
    expected = {
        "cross_entropy": nn.functional.cross_entropy(found["logits"], labels()),
        "distillation": KnowledgeDistillationLoss(alpha=0.0)(found["logits"], local["logits"], labels()),
        "feature": 0.1 * (found["host/layer3"] - local["b3"]).square().sum() / len(images()),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(losses[name], value, atol=1e-6), name


def test_only_links_learn_and_all_else_is_in_eval_mode():
    task = task_of([0, 1, 3, 4])
    task.set_modes()
    learning = {
        part for part in task.trained_parts if any(True for m in task.network.parts()[part] for _ in m.parameters())
    }
    assert learning == {"links/local/b0", "links/host/layer3"}
    training = {name for name, module in task.network.named_modules() if module.training and list(module.parameters())}
    assert training
    assert all(".link" in name or name == "" or name.startswith(("at:", "stages")) for name in training)
    for part in ("local", "host"):
        for module in task.network.parts()[part]:
            assert not any(each.training for each in module.modules())


def test_a_network_without_links_is_refused():
    with pytest.raises(ValueError, match=r"Links trains links, which this network lacks; set links.path"):
        Links(staged_network(seeded(Local), LOCAL_SAMPLE), loss=nn.CrossEntropyLoss())


# --- two parties ------------------------------------------------------------------------------------------------------

CROSSING = {"split": ["local/b0", "host/layer3"], "bottleneck": {"channels": 2, "width": 4}}
EXITS = {"exits": ["local/b0", "host/layer2", "local/b4"], "exit_head": {"convs": 0, "grid": 1}}
FAMILIES = {
    "links": ({}, None, 3),
    "a skip": ({"path": [0, None, None, 4]}, None, 0),
    "links alone": ({"use_host": False}, None, 3),
    "bottlenecks with codes": ({**CROSSING, "codec": {"bits": 4, "range": "sample"}}, None, 4),
    "a learned range": ({**CROSSING, "codec": {"bits": 4, "range": "learned"}}, None, 4),
    "noise over what is sent": ({**CROSSING, "noise": MagnitudeNullification(0.3)}, None, 4),
    "exits on both sides": (EXITS, ["exits", "links"], 5),
    "an encoder and exits": ({**CROSSING, **EXITS}, ["exits", "links", "bottleneck"], 6),
}


def service(changes, train):
    torch.manual_seed(7)
    given = {"path": [0, 1, 3, 4]} | changes
    path = given.pop("path")
    networks, samples = (seeded(Local), None if path[1] is None else seeded(Host)), (LOCAL_SAMPLE, HOST_SAMPLE)
    network = linked_network(*networks, samples, (LOCAL_BLOCKS, HOST_BLOCKS), path, **given)
    if train and "exits" in train:
        terms = {"exits": Term(AllExits(), of=["student/exits", "labels"])}
        return Links(network, loss=nn.CrossEntropyLoss(), extra_terms=terms, train=train, evaluators=[])
    return Links(network, loss=nn.CrossEntropyLoss(), train=train, evaluators=[])


class AllExits(nn.Module):
    def forward(self, exits, labels):
        return torch.stack([nn.functional.cross_entropy(logits, labels) for logits in exits]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_parties_learn_what_one_process_learns_in_every_bit(family):
    changes, train, gradients = FAMILIES[family]
    one = service(changes, train)
    two = copy.deepcopy(one)
    parties = TwoParties(two)
    batch = {"images": images(), "labels": labels()}
    optimizers = [torch.optim.Adam(one.parameter_groups(), lr=0.01)]
    optimizers += [torch.optim.Adam(two.parameter_groups(), lr=0.01)]
    for _ in range(3):
        for task, optimizer in zip((one, two), optimizers, strict=True):
            task.set_modes()
            optimizer.zero_grad()
            if task is one:
                losses = task.training_loss(batch)
                torch.stack(list(losses.values())).sum().backward()
            else:
                again, crossings = parties.step(batch)
        assert losses.keys() == again.keys()
        assert all(torch.equal(losses[name], again[name]) for name in losses)
        for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            assert a.grad is None or torch.equal(a.grad, b.grad), name
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(state(one.network), state(two.network), strict=True))
    passed = [each.tensor for each in crossings] + [each.gradient for each in crossings if each.gradient is not None]
    assert not any(tensor.requires_grad for tensor in passed)
    assert len(passed) == gradients


@pytest.mark.parametrize("range_", ["observed", "learned"])
def test_no_weights_change_hands(range_):
    task = service({**CROSSING, "codec": {"bits": 4, "range": range_}}, None)
    parties = TwoParties(task).parties
    local, host = parties["local"].network, parties["host"].network
    shared = {id(w) for w in local.parameters()} & {id(w) for w in host.parameters()}
    assert not shared
    assert {id(w) for w in task.network.parameters()} == {id(w) for side in (local, host) for w in side.parameters()}
    named = {side: {name for name, _ in party.network.named_weights()} for side, party in parties.items()}
    own = (
        "local.",
        "at:local/b0.bottleneck.encoder",
        "at:local/b0.bottleneck.quantizer",
        "at:host/layer3.bottleneck.decoder",
    )
    assert all(name.startswith(own) for name in named["local"])
    assert not any(name.startswith("local.") for name in named["host"])
    links = {id(w) for link in task.network.links.values() for w in link.parameters()}
    assert links <= {id(w) for w in host.parameters()}
    with pytest.raises(RuntimeError, match="held by the other party"):
        local(images())
    assert any(isinstance(module, Absent) for module in host.modules())
    assert not any(isinstance(module, Absent) for module in task.network.modules())
    with pytest.raises(ValueError, match="owner='server' is no side of the network: it has 'local', 'host'"):
        TwoParties(task, owner="server")


# --- the feature cache ------------------------------------------------------------------------------------------------


def cached(path, **settings) -> Links:
    torch.manual_seed(len(str(path)))
    network = link_blocks(settings.pop("local", None) or local_blocks(), host_blocks(), path, **settings)
    terms = {"loss": nn.CrossEntropyLoss(), "distillation": KnowledgeDistillationLoss(alpha=0.0)}
    cache = {"use": True, "dtype": "float32"}
    return Links(network, **terms, others={"teacher": teacher()}, feature_cache=cache, evaluators=[])


def test_all_paths_of_one_lout_share_what_is_stored():
    paths = ([2, 0, 3, 4], [2, 1, 1, 5], [2, 5, 5, 3], [2, None, None, 4], [2, None, None, 5])
    tasks = [cached(path) for path in paths] + [cached([2, 1, 4, 5], links={"style": "separable"})]
    assert {str(task.stored()) for task in tasks} == {str(tasks[0].stored())}
    assert tasks[0].stored().outputs == {"student": ("local/b2/input",), "teacher": ("logits",)}
    assert not tasks[0].stored().inputs
    assert len({task.frozen_digest() for task in tasks}) == 1
    assert cached([3, 0, 3, 4]).frozen_digest() != tasks[0].frozen_digest()
    other = cut_blocks(seeded(Local), LOCAL_SAMPLE, LOCAL_BLOCKS, "local")
    with torch.no_grad():
        other.stages.stage1.get_parameter("b1.0.weight")[0, 0, 0, 0] += 1e-3
    assert cached(paths[0], local=other).frozen_digest() != tasks[0].frozen_digest()
    behind = cut_blocks(seeded(Local), LOCAL_SAMPLE, LOCAL_BLOCKS, "local")
    with torch.no_grad():
        behind.stages.stage5.get_parameter("b5.0.weight")[0, 0, 0, 0] += 1.0
    assert cached(paths[0], local=behind).frozen_digest() == tasks[0].frozen_digest()


@pytest.mark.parametrize("parties", [False, True])
def test_losses_are_those_without_the_cache(parties):
    task = cached([2, 0, 3, 4])
    task.set_modes()
    batch = {"images": images(), "labels": labels()}
    without = task.training_loss(batch)
    stored = task.stored().compute({"student": task.network, "teacher": task.network_of("teacher")}, images())
    given = {"labels": labels(), "given": stored}
    found = TwoParties(task).step(given)[0] if parties else task.training_loss(given)
    assert without.keys() == found.keys()
    assert all(torch.equal(without[name], found[name]) for name in without)


def test_a_front_that_is_small_and_gives_much_is_not_stored():
    # The stem gives more than an image, and is a small share of a path through the whole host.
    task = cached([0, 0, 5, 1], links={"kernel": 9})
    front = next(cost.macs for cost in task.network.costs() if cost.name == "local/b0" and cost.kind == "stage")
    assert front < 0.1 * sum(cost.macs for cost in task.network.costs())
    assert 4 * 3 * 8 * 8 > 3 * 8 * 8
    assert task.stored().outputs == {"teacher": ("logits",)}
    assert task.stored().inputs
    # It is a larger share of a short path, and a late feature is smaller than an image.
    assert "student" in cached([0, 5, 5, 5]).stored().outputs
    assert "student" in cached([4, 0, 5, 5]).stored().outputs


def test_the_receiver_of_a_crossing_holds_no_noise_of_the_sender():
    task = service(FAMILIES["noise over what is sent"][0], None)
    parties = TwoParties(task).parties
    for cut, sender in (("local/b0", "local"), ("host/layer3", "host")):
        for side, party in parties.items():
            noise = party.network.bottlenecks[cut].noise
            assert isinstance(noise, Absent) == (side != sender)
