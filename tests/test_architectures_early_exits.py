from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cleave.architectures import ExitHead, StagedNetwork, Step, staged_network
from cleave.architectures.network.early_exits import in_sequence
from cleave.architectures.network.outputs import plan
from cleave.deployment import ExitPolicy, build_policy, offline

from .tiny_networks import CLASSES, EXITS, SAMPLE, Tiny, batch, family


@pytest.fixture(scope="module", params=EXITS)
def network(request: pytest.FixtureRequest) -> StagedNetwork:
    return family(request.param).double()


def policies(logits: Tensor) -> list[ExitPolicy]:
    """Policies of all kinds, by whose thresholds some samples leave at each exit."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(logits), len(logits), generator=generator).tril().add(0.1).tolist()
    found = [build_policy("patience", 1, exits=len(logits)), build_policy("confidence", 0.0, exits=len(logits))]
    for kind, more in (("confidence", {}), ("entropy", {}), ("margin", {}), ("ensemble", {"weights": weights})):
        never = build_policy(kind, None, exits=len(logits), **more)
        found += [never, never.with_thresholds([float(row.quantile(0.5)) for row in never.scores(logits)[:-1]])]
    return found


@pytest.mark.parametrize("count", [1, 13])
@torch.no_grad()
def test_leaving_early_equals_offline_evaluation_and_really_stops(network: StagedNetwork, count: int) -> None:
    images, own = batch(count).double(), network.group("exits")
    logits = torch.stack(list(network.outputs(images, own).values()))
    sizes: list[int] = []
    first = 1 if network.replaced else 0
    hooks = [
        stage.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        for stage in list(network.stages)[first:]
    ]
    # How many exits a sample has passed when it enters each stage.
    places = [network.cuts.index(cut) for cut in network.exits[:-1]]
    passed = [sum(place < stage for place in places) for stage in range(first, len(network.stages))]
    for policy in policies(logits):
        expected = offline(policy, logits)
        sizes.clear()
        found = network.run(images, policy)
        assert torch.equal(found.index, expected.index)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
        staying = [int((expected.index >= number).sum()) for number in passed]
        assert sizes == [size for size in staying if size]
    for hook in hooks:
        hook.remove()


def test_an_exit_runs_where_its_feature_is_and_the_way_stops_behind_it(network: StagedNetwork) -> None:
    ops = in_sequence(plan(network.ops, network.group("exits"), ()))
    assert sorted(map(str, ops)) == sorted(map(str, plan(network.ops, network.group("exits"), ())))
    made: set[str] = {"images"}
    for op in ops:
        assert made.issuperset(op.needs)
        made.update(op.gives)
    for cut in network.exits[:-1]:
        head = [op.step.method for op in ops if op.owner == f"at:{cut}.exit"]
        start = next(i for i, op in enumerate(ops) if op.owner == f"at:{cut}.exit")
        assert [op.step.method for op in ops[start : start + 2]] == head == ["reduce_feature", "classify"]


def test_a_network_without_exits_runs_to_its_end() -> None:
    built = family("insert")
    found = built.run(batch(), build_policy("confidence", None, exits=1))
    assert torch.equal(found.logits, built(batch()))
    assert found.index.tolist() == [0] * 6


@pytest.mark.parametrize("kind", ["exits", "insert"])
def test_a_policy_of_other_exits_is_refused_however_early_all_leave(kind: str) -> None:
    with pytest.raises(ValueError, match="the policy has 2 exits, the network"):
        family(kind).run(batch(), build_policy("confidence", 0.0, exits=2))


class Slow(ExitHead):
    """An exit in three steps, the first two at once and the last one behind all stages."""

    def steps(self) -> list[Step]:
        reduce, classify = super().steps()
        halve = Step("halve", ("reduced",), ("halved",), kind=self.kind)
        classify = Step("classify", ("halved",), ("logits",), ("exits",), kind=self.kind, late=True)
        return [reduce, halve, classify]

    emits = ("reduced", "halved", "logits")

    @staticmethod
    def halve(reduced: Tensor) -> Tensor:
        return reduced / 2


def test_an_exit_of_several_steps_leaves_early_too() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"exits": ["layer1", "layer2"], "exit_head": Slow}
    built = staged_network(Tiny(), SAMPLE, **settings).eval().double()
    images = batch().double()
    with torch.no_grad():
        logits = torch.stack(list(built.outputs(images, built.group("exits")).values()))
        policy = policies(logits)[3]
        expected, found = offline(policy, logits), built.run(images, policy)
    assert logits.shape == (3, 6, CLASSES)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
