"""Dynamic inference equals offline evaluation sample by sample, and it really stops."""

import math

import numpy as np
import pytest
import torch

from cleave.deployment import (
    Exited,
    anytime,
    build_policy,
    exit_shares,
    expected_cost,
    leave_early,
    offline,
    policy_from_dict,
)

E, C = 4, 3
TEMPERATURES = [0.5, 1.0, 2.0, 3.0]
COSTS = [10, 25, 40, 70]


class Network:
    """Elementwise steps, so that a sample's numbers are the same to the bit in any batch; every other has no exit."""

    def __init__(self, exits=E):
        self.exits = exits
        self.calls = []
        self.kept = []

    def carried(self, batch, dtype=torch.float64):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, C, generator=generator, dtype=torch.float64).to(dtype)
        maps = torch.randn(batch, 2, 1, 3, generator=generator)
        return {"x": x, "codes": torch.arange(batch).to(torch.uint8).view(-1, 1), "maps": maps}

    def steps(self):
        return [step for i in range(self.exits) for step in (self.transform(i), self.exit(i))]

    def transform(self, i):
        def step(carried):
            self.calls.append((f"transform {i}", len(carried["x"])))
            return None, carried | {"x": torch.sin(3 * carried["x"] + i)}

        return step

    def exit(self, i):
        def step(carried):
            self.calls.append((f"exit {i}", len(carried["x"])))
            self.kept.append(carried)
            return self.logits(i, carried), {} if i == self.exits - 1 else carried

        return step

    def logits(self, i, carried):
        """Depend on all that is carried: were the rows of one tensor mixed up, the answers would change."""
        x, others = carried["x"], carried["codes"] * 1e-3 + carried["maps"].sum((1, 2, 3)).unsqueeze(1)
        return (1 + i) * x + others.to(x.dtype) * x.flip(1)

    def all_logits(self, carried):
        found = []
        for i in range(self.exits):
            carried = carried | {"x": torch.sin(3 * carried["x"] + i)}
            found.append(self.logits(i, carried))
        return torch.stack(found)


def policies():
    generator = np.random.default_rng(1)
    learned = {"weights": (generator.random((E, E)) + 0.1).tolist(), "log_bias": generator.normal(size=(E, C)).tolist()}
    plain = {
        "confidence": build_policy("confidence", [0.8, 0.7, 0.6], exits=E),
        "confidence, tempered": build_policy("confidence", [0.8, None, 0.6], exits=E, temperatures=TEMPERATURES),
        "entropy": build_policy("entropy", 0.6, exits=E),
        "entropy, tempered": build_policy("entropy", [None, 0.5, 0.9], exits=E, temperatures=TEMPERATURES),
        "margin": build_policy("margin", [0.7, 0.4, None], exits=E, temperatures=TEMPERATURES),
        "patience 1": build_policy("patience", 1, exits=E, temperatures=TEMPERATURES),
        "patience 2": build_policy("patience", 2, exits=E),
        "ensemble": build_policy("ensemble", [0.8, 0.7, 0.6], exits=E),
        "ensemble, learned": build_policy("ensemble", [0.9, None, 0.6], exits=E, temperatures=TEMPERATURES, **learned),
        "all at once": build_policy("confidence", 0.0, exits=E),
        "all at the second": build_policy("entropy", [None, 1, 0], exits=E),
        "none": build_policy("confidence", None, exits=E),
        "none, ensemble": build_policy("ensemble", None, exits=E),
        "none, patience": build_policy("patience", None, exits=E),
    }
    bounded = {f"{name}, deadline": policy.with_deadline(45, COSTS) for name, policy in plain.items()}
    return plain | bounded | {"deadline at once": plain["none, ensemble"].with_deadline(10, COSTS)}


POLICIES = policies()


def one_by_one(policy, logits):
    """Take every sample on its own through the exits until it leaves."""
    answers, index = [], []
    for b in range(logits.shape[1]):
        state = policy.start(1, C, logits[0])
        for exit in range(E):
            answer, leave, state = policy.decide(exit, logits[exit, b : b + 1], state)
            if leave.item():
                break
        answers.append(answer)
        index.append(exit)
    return Exited(torch.cat(answers), torch.tensor(index))


# --- dynamic equals offline -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 13, 64])
@pytest.mark.parametrize("name", POLICIES)
def test_dynamic_inference_equals_offline_evaluation_and_really_stops(name, batch):
    network, policy = Network(), POLICIES[name]
    carried = network.carried(batch)
    logits = network.all_logits(carried)
    expected = offline(policy, logits)
    found = leave_early(network.steps(), carried, policy)
    alone = one_by_one(policy, logits)
    for other in (expected, alone):
        assert torch.equal(found.index, other.index)
        assert torch.equal(found.logits, other.logits)
    assert found.index.dtype == torch.int64
    assert found.logits.dtype == torch.float64
    survivors = [batch, *(int((alone.index > i).sum()) for i in range(E - 1))]
    parts = [(f"{part} {i}", n) for i, n in enumerate(survivors) for part in ("transform", "exit")]
    assert network.calls == [(part, n) for part, n in parts if n]
    # In the order of the inputs, all tensors alike.
    for i, kept in enumerate(network.kept):
        assert kept["codes"].flatten().tolist() == [b for b in range(batch) if alone.index[b] >= i]


def test_the_policies_above_do_what_they_are_there_for():
    network = Network()
    logits = network.all_logits(network.carried(64))
    for name, policy in POLICIES.items():
        shares = exit_shares(offline(policy, logits).index, E)
        if "all" in name:
            assert sorted(shares) == [0, 0, 0, 1]
        elif "none" in name or "at once" in name:
            assert shares[0 if "at once" in name else 2 if "deadline" in name else 3] == 1
        else:
            possible = [
                policy.latest in (None, exit)
                if exit == 3
                else (threshold is not None or exit == policy.latest)
                and not (policy.kind == "patience" and exit < threshold)
                for exit, threshold in enumerate((*policy.thresholds, None))
            ]
            assert [share > 0 for share in shares] == possible, name


def test_the_policy_that_a_json_file_holds_decides_the_same():
    network = Network()
    logits = network.all_logits(network.carried(13))
    for policy in POLICIES.values():
        found, expected = offline(policy_from_dict(policy.to_dict()), logits), offline(policy, logits)
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
@pytest.mark.parametrize("name", ["confidence", "patience 1", "ensemble, learned"])
def test_answers_are_of_the_dtype_of_the_logits(name, dtype):
    network = Network()
    carried = network.carried(13, dtype)
    found = leave_early(network.steps(), carried, POLICIES[name])
    expected = offline(POLICIES[name], network.all_logits(carried))
    assert found.logits.dtype == expected.logits.dtype == dtype
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("name", ["confidence", "patience 1", "ensemble, learned"])
def test_an_empty_batch_gives_empty_answers(name):
    network = Network()
    carried = network.carried(0)
    for found in (leave_early(network.steps(), carried, POLICIES[name]), offline(POLICIES[name], torch.zeros(E, 0, C))):
        assert found.logits.shape == (0, C)
        assert found.index.shape == (0,)
    assert network.calls == [("transform 0", 0), ("exit 0", 0)]


def test_where_none_leaves_nothing_is_copied():
    network = Network()
    carried = network.carried(5)
    leave_early(network.steps(), carried, POLICIES["none, patience"])
    assert len(network.kept) == E
    assert all(kept["maps"] is carried["maps"] for kept in network.kept)
    network.kept.clear()
    leave_early(network.steps(), carried, POLICIES["confidence, tempered"])
    assert network.kept[2]["maps"] is network.kept[1]["maps"] is not carried["maps"]  # none leaves at the second exit


def test_gradients_flow_through_early_answers():
    network = Network()
    carried = network.carried(13)
    carried["x"].requires_grad_()
    found = leave_early(network.steps(), carried, POLICIES["ensemble"]).logits.square().sum()
    expected = offline(POLICIES["ensemble"], network.all_logits(carried)).logits.square().sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, carried["x"])[0] for loss in (found, expected)))


def test_what_a_sample_would_have_answered_later_is_not_looked_at():
    """A NaN behind the exit where a sample left does not reach dynamic inference; stored, it is refused."""
    logits = torch.tensor([[[9.0, 0.0], [0.1, 0.0]], [[math.nan, 0.0], [0.0, 9.0]]])
    policy = build_policy("confidence", 0.9, exits=2)
    steps = [lambda carried, own=own: (own[carried["row"]], carried) for own in logits]
    found = leave_early(steps, {"row": torch.arange(2)}, policy)
    assert found.index.tolist() == [0, 1]
    assert found.logits.tolist() == [[9, 0], [0, 9]]
    with pytest.raises(ValueError, match="logits of exit 1 hold NaN"):
        offline(policy, logits)


# --- anytime, costs, shares -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "last"), [(10, 0), (24, 0), (25, 1), (69.9, 2), (1e9, 3)])
def test_the_best_answer_at_a_budget_is_that_of_the_last_exit_that_fits(budget, last):
    network = Network()
    carried = network.carried(5)
    logits = network.all_logits(carried)
    assert torch.equal(anytime(logits, COSTS, budget), logits[last])
    for name in ("confidence, tempered", "patience 1", "ensemble, learned"):
        policy = POLICIES[name]
        state = policy.start(5, C, logits[0])
        for exit in range(last + 1):
            best, _, state = policy.decide(exit, logits[exit], state)
        assert torch.equal(anytime(logits, COSTS, budget, policy), best)
    network.calls.clear()
    leave_early(network.steps(), carried, POLICIES["none"].with_deadline(budget, COSTS))
    assert network.calls[-1] == (f"exit {last}", 5)


def test_no_sample_costs_more_than_the_deadline():
    network = Network()
    logits = network.all_logits(network.carried(64))
    for policy in (policy for policy in POLICIES.values() if policy.latest is None):
        left = offline(policy.with_deadline(39, COSTS), logits).index
        assert max(COSTS[i] for i in left) <= 39
        assert torch.equal(left, offline(policy, logits).index.clamp(max=1))


def test_costs_and_shares_are_means_over_the_samples():
    index = torch.tensor([0, 0, 3, 1, 3, 3, 0])
    assert exit_shares(index, E) == pytest.approx([3 / 7, 1 / 7, 0, 3 / 7])
    assert exit_shares(index, 5) == pytest.approx([3 / 7, 1 / 7, 0, 3 / 7, 0])
    assert expected_cost(index, COSTS) == pytest.approx(np.mean([COSTS[i] for i in index]), rel=1e-15)
    assert expected_cost(index, [2**60 + i for i in range(E)]) == pytest.approx(2**60)


# --- refusals -------------------------------------------------------------------------------------------------------


def of_logits(*shapes):
    """Steps that return zeros of these shapes, or nothing, whatever they get."""
    return [
        lambda carried, shape=shape: (None if shape is None else torch.zeros(len(carried["x"]), *shape), carried)
        for shape in shapes
    ]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "the policy has 3 exits, but there are only 0 steps"),
        (of_logits((C,), (C,)), "the policy has 3 exits, but there are only 2 steps"),
        (of_logits((C,), None, (C,)), "the policy has 3 exits.*the steps have only 2"),
        (of_logits((C,), (C,), None), "the policy has 3 exits.*the steps have only 2"),
        (
            of_logits((C,), (C,), (C,), (C,)),
            "the policy has 3 exits.*step 3 of 4 has the last of them; give a threshold",
        ),
        (of_logits((C,), (C,), (C,), None), "the policy has 3 exits.*step 3 of 4"),
        (of_logits((C,), (C, 1), (C,)), r"logits of exit 1 must be floats \(B, C\).*\(5, 3, 1\)"),
        (of_logits((), (C,), (C,)), r"logits of exit 0 must be floats \(B, C\).*\(5,\)"),
    ],
)
def test_steps_of_other_exits_than_the_policys_are_refused(steps, words):
    with pytest.raises(ValueError, match=words):
        leave_early(steps, {"x": torch.zeros(5, 2)}, build_policy("confidence", None, exits=3))


def test_exits_that_know_other_classes_are_refused():
    first = [lambda carried: (torch.tensor([[9.0, 0.0], [0.0, 0.0]]), carried), *of_logits((C,))]
    with pytest.raises(ValueError, match=r"same classes, got \[2, 3\]"):
        leave_early(first, {"x": torch.zeros(2, 2)}, build_policy("confidence", 0.9, exits=2))
    with pytest.raises(ValueError, match="1 exits before exit 1"):
        leave_early(of_logits((2,), (C,)), {"x": torch.zeros(2, 2)}, build_policy("ensemble", 0.9, exits=2))


@pytest.mark.parametrize(
    ("carried", "words"),
    [
        ({}, "one row a sample, got none"),
        ({"x": torch.zeros(())}, r"one row a sample, got x \(\)"),
        ({"x": torch.zeros(2, 1), "y": torch.zeros(3)}, r"as many rows.*x \(2, 1\), y \(3,\)"),
    ],
)
def test_tensors_without_a_row_for_each_sample_are_refused(carried, words):
    with pytest.raises(ValueError, match=words):
        leave_early(of_logits((C,), (C,)), carried, build_policy("confidence", None, exits=2))


@pytest.mark.parametrize(
    "result",
    [
        (None, {"x": torch.zeros(4, 2)}),
        (None, {"x": torch.zeros(5, 2), "y": torch.zeros(1)}),
        (torch.zeros(5, C), {"x": torch.zeros(())}),
        (torch.zeros(1, C), {"x": torch.zeros(5, 2)}),
    ],
)
def test_a_step_that_loses_samples_is_refused(result):
    steps = [lambda carried: result, *of_logits((C,), (C,))]
    with pytest.raises(ValueError, match="step 1 must return one row for each of 5 samples, got"):
        leave_early(steps, {"x": torch.zeros(5, 2)}, build_policy("confidence", None, exits=3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda policy: offline(policy, torch.zeros(2, 5, C)), "policy has 3 exits.*logits hold 2; give 1 thresholds"),
        (lambda policy: offline(policy, torch.zeros(5, C)), r"logits must be \(E, B, C\).*\(5, 3\)"),
        (lambda policy: offline(policy, torch.zeros(3, 5, C, dtype=torch.int64)), "must be floats"),
        (lambda policy: anytime(torch.zeros(3, 5, C), [4, 5, 6], 3.5), r"deadline=3\.5 .*least possible is 4"),
        (lambda policy: anytime(torch.zeros(3, 5, C), [4, 5], 5), "costs must be 3 numbers"),
        (lambda policy: anytime(torch.zeros(2, 5, C), [4, 5], 5, policy), "policy has 3 exits|costs must be 3"),
        (lambda policy: exit_shares(torch.tensor([0, 3]), 3), "index must be int64.*0 to 2"),
        (lambda policy: exit_shares(torch.tensor([-1]), 3), "index must be"),
        (lambda policy: exit_shares(torch.tensor([0.0]), 3), "index must be int64"),
        (lambda policy: exit_shares(torch.zeros(0, dtype=torch.int64), 3), "index must be"),
        (lambda policy: expected_cost(torch.tensor([0, 3]), [1, 2, 3]), "index must be int64.*0 to 2"),
        (lambda policy: expected_cost(torch.tensor([0, 1]), [1, 1, 3]), "rise from exit to exit"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(build_policy("confidence", 0.5, exits=3))
