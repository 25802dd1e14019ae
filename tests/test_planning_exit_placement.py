import itertools

import numpy as np
import pytest
import torch

from cleave.deployment import build_policy
from cleave.planning import exit_bits, place_exits


def outcome(correct, leaves, stages, heads, chosen):
    """Number of right answers and total cost, sample by sample."""
    right, total = 0, 0
    for b in range(leaves.shape[1]):
        for j in range(len(stages)):
            total += stages[j] + (heads[j] if j in chosen else 0)
            if j == len(heads) or (j in chosen and leaves[j, b]):
                right += int(correct[j, b])
                break
    return right, total


def brute_force(instance, count, budget):
    """The most right answers within the budget, then the least cost; None if nothing keeps to it."""
    candidates, batch = instance[1].shape
    found = [outcome(*instance, chosen) for chosen in itertools.combinations(range(candidates), count)]
    kept = [(right, -cost) for right, cost in found if cost <= budget * batch]
    return (max(kept)[0], -max(kept)[1]) if kept else None


def random_case(seed, nested, batch=10):
    generator = np.random.default_rng(seed)
    candidates = int(generator.integers(2, 7))
    scores = generator.random((candidates, batch))
    leaves = (np.maximum.accumulate(scores, 0) if nested else scores) > 0.6
    correct = generator.random((candidates + 1, batch)) < np.linspace(0.5, 0.9, candidates + 1)[:, None]
    stages, heads = generator.integers(1, 10, candidates + 1).tolist(), generator.integers(0, 5, candidates).tolist()
    budget = float(generator.uniform(0.5, 1.1) * sum(stages))
    return (correct, leaves, stages, heads), int(generator.integers(1, candidates + 1)), budget


def place(instance, count, budget, **more):
    correct, leaves, stages, heads = instance
    return place_exits(torch.from_numpy(correct), torch.from_numpy(leaves), stages, heads, count, budget, **more)


def check_optimal(instance, count, budget, **more):
    """Compare with brute force; return whether anything keeps to the budget."""
    best = brute_force(instance, count, budget)
    if best is None:
        with pytest.raises(ValueError, match="keeps to budget"):
            place(instance, count, budget, **more)
        return False
    found = place(instance, count, budget, **more)
    assert outcome(*instance, found.exits) == best
    assert (found.accuracy, found.cost) == (best[0] / 10, best[1] / 10)
    assert found.exact
    assert len(found.exits) == count
    return True


def test_nested_decisions_equal_brute_force_on_200_instances():
    feasible = [check_optimal(*random_case(seed, nested=True), exhaustive_up_to=0) for seed in range(200)]
    assert 50 < sum(feasible) < 200  # both sides of the budget are tried


def test_other_decisions_equal_brute_force_while_choices_are_few():
    assert sum(check_optimal(*random_case(seed, nested=False)) for seed in range(60)) > 20


def test_the_heuristic_is_true_within_budget_and_close(record_property):
    gaps = []
    for seed in range(200):
        instance, count, budget = random_case(seed, nested=False)
        best = brute_force(instance, count, budget)
        if best is None:
            continue
        found = place(instance, count, budget, exhaustive_up_to=0)
        right, cost = outcome(*instance, found.exits)
        assert (found.accuracy, found.cost) == (right / 10, cost / 10)
        assert found.cost <= budget
        gaps.append(best[0] / 10 - found.accuracy)
        nested = not (instance[1][:-1] & ~instance[1][1:]).any()
        assert found.exact == nested
    record_property("mean gap in points", float(100 * np.mean(gaps)))
    assert len(gaps) > 100
    assert min(gaps) >= 0
    assert np.mean(gaps) < 0.002


def test_large_whole_costs_are_exact():
    correct, leaves = torch.ones(3, 4, dtype=torch.bool), torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    huge = 10**18
    found = place_exits(correct, leaves, np.array([huge, huge, 7]), [1, 1], 1, budget=2 * huge)
    assert (found.exits, found.exact) == ((0,), True)
    assert found.cost == (huge + 1 + 3 * (2 * huge + 8)) / 4


def test_bits_of_stored_logits_are_the_policys_own_decisions():
    logits = torch.randn(4, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(20) % 3
    policy = build_policy("entropy", [0.5, None, 0.7], exits=4)
    correct, leaves = exit_bits(policy, logits, labels)
    scores = policy.scores(logits)
    assert torch.equal(correct, logits.argmax(2) == labels)
    assert torch.equal(leaves, torch.stack([scores[0] <= 0.5, torch.zeros(20).bool(), scores[2] <= 0.7]))
    refused = [build_policy(kind, 1, exits=4) for kind in ("patience", "ensemble")]
    for other in (*refused, policy.with_deadline(2, costs=[1, 2, 3, 4])):
        with pytest.raises(ValueError, match="depends on which others exist"):
            exit_bits(other, logits, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count must be a whole number of 1 to 2"),
        ({"count": 3}, "count must be a whole number of 1 to 2"),
        ({"count": True}, "count must be a whole number of 1 to 2"),
        ({"budget": 1}, "the cheapest costs 11"),
        ({"budget": float("nan")}, "budget must be a number"),
        ({"stage_costs": [1, 2]}, "stage_costs must be 3 numbers"),
        ({"head_costs": [1, -1]}, "head_costs must be 2 numbers of at least 0"),
        ({"leaves": torch.ones(3, 4).bool()}, r"correct must be \(N \+ 1, B\)"),
        ({"leaves": torch.ones(2, 4)}, "must be bool"),
    ],
)
def test_placement_refuses(change, message):
    given = {
        "correct": torch.ones(3, 4).bool(), "leaves": torch.ones(2, 4).bool(), "stage_costs": [10, 10, 10],
        "head_costs": [1, 1], "count": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        place_exits(**{**given, **change})
