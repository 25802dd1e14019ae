from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from cleave.architectures import every_path, link_blocks
from cleave.lightning_modules import Links

from .linked_networks import HOST_SAMPLE, host_blocks, images, labels, local_blocks


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
    assert len(cross), len(skips) == (315, 10)
    assert set(PATHS) == {*cross, *skips}
    assert len(PATHS) == 325


@pytest.mark.untraced
@pytest.mark.parametrize("lout", range(5))
def test_every_path_trains_its_links_and_nothing_else(lout):
    local, host = local_blocks(), host_blocks()
    before = state(local.stages, host.stages)
    with torch.no_grad():
        outputs = host.stages.eval()(HOST_SAMPLE), local.stages.eval()(images())
    for path in (each for each in PATHS if each.lout == lout):
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
