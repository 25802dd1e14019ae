"""Scores and answers against NumPy in float64, decisions, JSON, and each refusal."""

import json
import math

import numpy as np
import pytest
import torch

from cleave.deployment import POLICIES, EnsemblePolicy, ExitPolicy, PatiencePolicy, build_policy, policy_from_dict

E, B, C = 4, 7, 5
TEMPERATURES = [0.5, 1.0, 2.0, 3.0]


def logits_of(dtype=torch.float64, seed=0):
    return 2 * torch.randn(E, B, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def learned():
    """Weights and biases of an ensemble, with numbers above the diagonal that nobody may look at."""
    generator = np.random.default_rng(1)
    return {"weights": (generator.random((E, E)) + 0.1).tolist(), "log_bias": generator.normal(size=(E, C)).tolist()}


def ensembled(p, weights=None, log_bias=None):
    """q_m^k ∝ b_m^k Π p_i^k ^ w_mi, as the paper prints it."""
    q = np.ones_like(p) if log_bias is None else np.exp(np.broadcast_to(np.array(log_bias)[:, None], p.shape)).copy()
    for m in range(len(p)):
        for i in range(m + 1):
            q[m] *= p[i] ** (1 / (m + 1) if weights is None else weights[m][i])
    return q / q.sum(-1, keepdims=True)


def agreements(logits):
    """Patience in plain Python."""
    counts = np.zeros(logits.shape[:2])
    for b in range(logits.shape[1]):
        for m in range(1, len(logits)):
            same = logits[m, b].argmax() == logits[m - 1, b].argmax()
            counts[m, b] = counts[m - 1, b] + 1 if same else 0
    return counts


REFERENCES = {
    "confidence": lambda logits: softmax(logits).max(-1),
    "entropy": lambda logits: -(softmax(logits) * np.log(softmax(logits))).sum(-1) / np.log(C),
    "margin": lambda logits: np.diff(np.sort(softmax(logits))[..., -2:])[..., 0],
    "patience": agreements,
    "ensemble": lambda logits: ensembled(softmax(logits)).max(-1),
}


def run(policy, logits):
    """Every decision as if no sample had left."""
    state, decisions = policy.start(*logits.shape[1:], logits[0]), []
    for exit, own in enumerate(logits):
        decisions.append(policy.decide(exit, own, state))
        state = decisions[-1].state
        assert all(len(tensor) == logits.shape[1] for tensor in state.values())
    return decisions


# --- scores and decisions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", [None, TEMPERATURES])
@pytest.mark.parametrize("kind", REFERENCES)
def test_scores_equal_the_float64_reference(kind, temperatures):
    policy = build_policy(kind, None, exits=E, temperatures=temperatures)
    logits = logits_of()
    scaled = logits.numpy() / np.array(temperatures or [1.0] * E)[:, None, None]
    np.testing.assert_allclose(policy.scores(logits).numpy(), REFERENCES[kind](scaled), rtol=1e-10)
    single = policy.scores(logits.float())
    np.testing.assert_allclose(single.numpy(), REFERENCES[kind](scaled), rtol=2e-5, atol=1e-6)
    if kind != "patience":
        assert single.dtype == torch.float32


@pytest.mark.parametrize("kind", ["confidence", "entropy", "margin", "ensemble"])
def test_a_sample_leaves_on_the_right_side_of_its_exits_threshold_and_on_it(kind):
    logits = logits_of()
    scores = build_policy(kind, None, exits=E).scores(logits)
    thresholds = [scores[0, 3].item(), None, scores[2, 5].item()]
    policy = build_policy(kind, thresholds, exits=E)
    leaves = torch.stack([decision.leave for decision in run(policy, logits)])
    for exit, threshold in enumerate(thresholds):
        for b in range(B):
            score = scores[exit, b].item()
            reached = threshold is not None and (score <= threshold if kind == "entropy" else score >= threshold)
            assert leaves[exit, b].item() == reached
    assert leaves[0, 3]
    assert leaves[2, 5]
    assert 0 < leaves[:3].sum() < 2 * B
    assert leaves[3].all()


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_policy_says_which_thresholds_there_are(kind):
    policy = build_policy(kind, None, exits=E)
    scores, certainties = (of(logits_of()).double() for of in (policy.scores, policy.certainties))
    # At the certainty of a sample as the threshold of an exit, it leaves there, and who is as certain.
    if policy.per_exit:
        assert policy.candidates() is None
        chosen = [certainties[0, 2].item(), math.inf, certainties[2, 1].item()]
        found = policy.with_certainties(chosen)
        assert found.thresholds == (scores[0, 2].item(), None, scores[2, 1].item())
        assert [found.threshold_words(exit) for exit in (1, 3)] == ["", ""]
        assert found.threshold_words(0) == f"{scores[0, 2].item():g}"
        leaves = torch.stack([decision.leave for decision in run(found, logits_of())])
        for exit in (0, 2):
            assert torch.equal(leaves[exit], certainties[exit] >= chosen[exit])
    else:
        assert list(policy.candidates()) == [1, 2, 3]
        found = policy.with_certainties([2.0] * 3)
        assert found.thresholds == (2, 2, 2)
        assert found.threshold_words(0) == "2"


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_policy_says_what_the_next_exit_must_know(kind):
    policy = build_policy(kind, None, exits=E)
    for exit, decision in enumerate(run(policy, logits_of(torch.float32))[:-1]):
        known = policy.state_behind(exit, C)
        assert {name: (x.shape[1:], x.dtype) for name, x in known.items()} == {
            name: (x.shape[1:], x.dtype) for name, x in decision.state.items()
        }
        assert bool(known) == policy.carries


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_leaves_after_so_many_agreements(patience):
    # Three classes, so that both agreement and change are common.
    logits = torch.randn(6, 64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = agreements(logits.numpy())
    leaves = [decision.leave.numpy() for decision in run(build_policy("patience", patience, exits=6), logits)]
    np.testing.assert_array_equal(leaves[:5], counts[:5] >= patience)
    assert not np.array(leaves[:patience]).any()
    assert np.array(leaves[patience]).any()


def test_the_exits_answer_with_their_scaled_logits():
    logits = logits_of()
    for kind in ("confidence", "entropy", "margin", "patience"):
        for decision, own, t in zip(
            run(build_policy(kind, None, exits=E, temperatures=TEMPERATURES), logits), logits, TEMPERATURES, strict=True
        ):
            assert torch.equal(decision.answer, own / t)
    assert run(build_policy("confidence", 0.5, exits=E), logits)[0].answer.data_ptr() == logits[0].data_ptr()


@pytest.mark.parametrize("settings", [{}, learned(), {"weights": learned()["weights"]}])
def test_the_ensemble_answers_with_the_weighted_geometric_mean(settings):
    logits = logits_of()
    expected = ensembled(softmax(logits.numpy() / np.array(TEMPERATURES)[:, None, None]), **settings)
    policy = build_policy("ensemble", None, exits=E, temperatures=TEMPERATURES, **settings)
    answers = torch.stack([decision.answer for decision in run(policy, logits)])
    np.testing.assert_allclose(answers.softmax(-1).numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(policy.scores(logits).numpy(), expected.max(-1), rtol=1e-10)
    assert [policy.macs(exit, C) for exit in range(E)] == [C, 2 * C, 3 * C, 4 * C]


@pytest.mark.parametrize("kind", POLICIES)
def test_logits_far_apart_stay_in_range(kind):
    logits = torch.tensor([[[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], [[-1e4, 0.0, 1e4], [0.0, 0.0, 0.0]]])
    scores = build_policy(kind, None, exits=2).scores(logits)
    assert ((scores >= 0) & (scores <= 1)).all()
    # A uniform distribution has the largest entropy there is, and a threshold that lets it leave.
    policy = build_policy("entropy", 1, exits=2)
    for classes in range(2, 40):
        assert policy.decide(0, torch.zeros(3, classes), {}).leave.all()


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("kind", POLICIES)
def test_half_precision_is_judged_in_single(kind, dtype):
    logits = logits_of(dtype)
    policy = build_policy(kind, None, exits=E)
    assert torch.equal(policy.scores(logits), policy.scores(logits.float()))
    assert {decision.answer.dtype for decision in run(policy, logits)} == {dtype}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_decision_does_not_depend_on_the_other_samples(kind):
    logits = logits_of()
    policy = build_policy(kind, 1 if kind == "patience" else 0.6, exits=E, temperatures=TEMPERATURES)
    for together, *alone in zip(
        run(policy, logits), *(run(policy, logits[:, b : b + 1]) for b in range(B)), strict=True
    ):
        assert torch.equal(together.answer, torch.cat([decision.answer for decision in alone]))
        assert torch.equal(together.leave, torch.cat([decision.leave for decision in alone]))


def test_what_passes_from_exit_to_exit_is_told():
    carries = {kind: policy.carries for kind, policy in POLICIES.items()}
    assert carries == {"confidence": False, "entropy": False, "margin": False, "patience": True, "ensemble": True}
    assert [kind for kind, policy in POLICIES.items() if policy.final_needs_state] == ["ensemble"]
    # A last exit that needs no state does without it on another machine.
    logits = logits_of()[3]
    decision = build_policy("patience", 1, exits=E, temperatures=TEMPERATURES).decide(3, logits, {})
    assert torch.equal(decision.answer, logits / 3)
    assert decision.leave.all()


def test_one_exit_is_the_last():
    policy = build_policy("confidence", 0.5, exits=1)
    assert policy.thresholds == ()
    assert policy.decide(0, torch.zeros(2, 3), {}).leave.all()


# --- deadlines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deadline", "latest"), [(10, 0), (24.9, 0), (25, 1), (39, 1), (40, 2), (99, 3), (math.inf, 3)]
)
def test_a_deadline_names_the_last_exit_that_fits(deadline, latest):
    policy = build_policy("confidence", None, exits=E).with_deadline(deadline, costs=[10, 25, 40, 70.5])
    assert policy.latest == latest
    leaves = [decision.leave.all().item() for decision in run(policy, logits_of())]
    assert leaves == [exit >= latest for exit in range(E)]


@pytest.mark.parametrize("kind", POLICIES)
def test_before_the_deadline_all_is_as_without(kind):
    logits = logits_of()
    policy = build_policy(kind, 1 if kind == "patience" else 0.6, exits=E, temperatures=TEMPERATURES)
    bounded = policy.with_deadline(2.5, costs=[1, 2, 3, 4])
    decisions = run(policy, logits)
    for exit, (found, expected) in enumerate(zip(run(bounded, logits), decisions, strict=True)):
        assert torch.equal(found.answer, expected.answer)
        assert torch.equal(found.leave, expected.leave | torch.tensor(exit >= 1))
    assert torch.equal(bounded.scores(logits), policy.scores(logits))


@pytest.mark.parametrize(
    ("deadline", "costs", "words"),
    [
        (9.5, [10, 20, 30, 40], r"deadline=9\.5 cannot be kept: the least possible is 10"),
        (math.nan, [10, 20, 30, 40], "deadline must be a number.*nan"),
        (True, [0.5, 20, 30, 40], "deadline must be a number.*True"),
        (20, [10, 20, 30], "costs must be 4 numbers.*got 3"),
        (20, [10, 20, 20, 40], "rise from exit to exit"),
        (20, [0, 20, 30, 40], "positive"),
        (20, [10, 20, 30, math.nan], "rise from exit to exit.*nan"),
        (20, [10, "20", 30, 40], "rise from exit to exit.*'20'"),
    ],
)
def test_a_deadline_that_cannot_be_is_refused(deadline, costs, words):
    with pytest.raises(ValueError, match=words):
        build_policy("confidence", 0.5, exits=4).with_deadline(deadline, costs)


# --- building, JSON -------------------------------------------------------------------------------------------------


def test_one_number_is_shared_by_all_exits():
    policy = build_policy("margin", np.float32(0.25), exits=3, temperatures=2)
    assert (policy.thresholds, policy.temperatures, policy.exits) == ((0.25, 0.25), (2.0, 2.0, 2.0), 3)
    assert policy.with_thresholds([0.5, None]).thresholds == (0.5, None)
    assert policy.with_thresholds(None).thresholds == (None, None)
    assert policy.with_thresholds(1) == build_policy("margin", [1, 1.0], exits=3, temperatures=[2, 2, 2])
    assert policy.with_temperatures([1, 2, 3]).temperatures == (1.0, 2.0, 3.0)
    assert policy.with_temperatures(None) == build_policy("margin", 0.25, exits=3)
    assert build_policy("patience", 2, exits=4).thresholds == (2, 2, 2)
    assert build_policy("confidence", exits=3).thresholds == (None, None)


EXAMPLES = [
    build_policy("confidence", [0.1 + 0.2, None, 1], exits=E, temperatures=TEMPERATURES),
    build_policy("entropy", 1 / 3, exits=E).with_deadline(2, [1, 2, 3, 4]),
    build_policy("margin", None, exits=E, temperatures=1 / 7),
    build_policy("patience", 2, exits=E, latest=np.int64(3)),
    build_policy("patience", None, exits=E),
    build_policy("ensemble", 0.9, exits=E),
    build_policy("ensemble", 0.9, exits=E, temperatures=TEMPERATURES, **learned()),
]


@pytest.mark.parametrize("policy", EXAMPLES)
def test_json_gives_the_same_policy_back(policy):
    values = json.loads(json.dumps(policy.to_dict(), allow_nan=False))
    assert values == policy.to_dict()
    again = policy_from_dict(values)
    assert again == policy
    assert again.to_dict() == policy.to_dict()
    for found, expected in zip(run(again, logits_of()), run(policy, logits_of()), strict=True):
        assert torch.equal(found.answer, expected.answer)
        assert torch.equal(found.leave, expected.leave)


def test_json_is_plain():
    values = build_policy(
        "ensemble", [0.5], exits=2, weights=[[1, 9], [0.25, 0.75]], log_bias=[[0, 1], [2, 3]]
    ).to_dict()
    assert values == {
        "kind": "ensemble",
        "thresholds": [0.5],
        "temperatures": None,
        "latest": None,
        "weights": [[1.0, 0.0], [0.25, 0.75]],
        "log_bias": [[0.0, 1.0], [2.0, 3.0]],
        "last": True,
    }


def test_at_a_patience_of_0_all_leave_at_the_first_exit():
    logits = torch.randn(3, 6, 4)
    policy = build_policy("patience", 0, exits=3)
    first = policy.decide(0, logits[0], policy.start(6, 4, logits[0]))
    assert first.leave.all()
    assert torch.equal(first.answer, logits[0])
    assert 0 not in policy.candidates()  # a search never takes what looks at one exit


@pytest.mark.parametrize("kind", ["confidence", "margin", "ensemble"])
def test_a_tie_at_the_threshold_leaves(kind):
    logits = torch.tensor([[0.75, 0.25]]).log()
    score = build_policy(kind, exits=2).scores(torch.stack([logits, logits]))[0, 0].item()
    for threshold, leaves in ((score, True), (float(np.nextafter(np.float32(score), np.float32(1))), False)):
        policy = build_policy(kind, threshold, exits=2)
        assert policy.decide(0, logits, policy.start(1, 2, logits)).leave.tolist() == [leaves]


def test_the_last_exit_may_answer_by_itself():
    logits = torch.randn(3, 5, 4)
    both = [build_policy("ensemble", exits=3, last=last) for last in (True, False)]
    assert [policy.final_needs_state for policy in both] == [True, False]
    assert [policy.macs(2, 4) for policy in both] == [12, 0]
    assert both[1].macs(1, 4) == 8
    state, answers = both[1].start(5, 4, logits[0]), []
    for exit, own in enumerate(logits):
        answer, _, state = both[1].decide(exit, own, state)
        answers.append(answer)
    mean = (logits[0].log_softmax(1) + logits[1].log_softmax(1)) / 2
    torch.testing.assert_close(answers[1], mean)
    assert torch.equal(answers[2], logits[2])
    assert policy_from_dict(both[1].to_dict()) == both[1]
    with pytest.raises(ValueError, match="last must be true or false, got 0"):
        build_policy("ensemble", exits=3, last=0)


GOOD = {"kind": "confidence", "thresholds": [0.5], "temperatures": None, "latest": None}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["confidence"], "needs a kind"),
        ({}, "needs a kind, one of confidence, entropy"),
        (GOOD | {"kind": None}, "needs a kind"),
        (GOOD | {"kind": "confidenc"}, "got 'confidenc'. Did you mean 'confidence'?"),
        (GOOD | {"treshold": 1}, r"keys \['latest', 'temperatures', 'thresholds'\], got .*'treshold'"),
        ({"kind": "confidence", "thresholds": [0.5]}, r"takes the keys .* got \['thresholds'\]"),
        (GOOD | {"weights": None}, "takes the keys"),
        (GOOD | {"thresholds": 0.5}, "thresholds must be a list of numbers, got 0.5"),
        (GOOD | {"thresholds": "0.5"}, "thresholds must be a list of numbers, got '0.5'"),
        (GOOD | {"thresholds": ["0.5"]}, "threshold of exit 0 must be from 0 to 1.*'0.5'"),
        (GOOD | {"thresholds": [[0.5]]}, "threshold of exit 0 must be from 0 to 1"),
        (GOOD | {"temperatures": 1.0}, "temperatures must be a list"),
        (GOOD | {"latest": 2}, "latest must be an exit, 0 to 1, or None, got 2"),
        (GOOD | {"latest": -1}, "latest must be an exit"),
        (GOOD | {"latest": 1.0}, "latest must be an exit"),
        (GOOD | {"latest": True}, "latest must be an exit"),
    ],
)
def test_json_of_another_kind_key_or_type_is_refused(values, words):
    policy_from_dict(GOOD)
    with pytest.raises(ValueError, match=words):
        policy_from_dict(values)


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (("entropi", 0.5), {}, "kind must be one of.*got 'entropi'. Did you mean 'entropy'?"),
        ((3, 0.5), {}, "kind must be one of.*got 3"),
        (("confidence", 0.5), {"exits": 0}, "exits must be a whole number of at least 1.*0"),
        (("confidence", 0.5), {"exits": True}, "exits must be a whole number"),
        (
            ("confidence", 0.5),
            {"weights": [[1.0]]},
            "confidence policy takes no weights; it takes latest, temperatures",
        ),
        (("confidence", [0.5]), {}, "thresholds must be 2 numbers.*got 1"),
        (("confidence", "0.5"), {}, "thresholds must be a list of numbers, got '0.5'"),
        (("confidence", 1.01), {}, "exit 0 must be from 0 to 1, as the largest probability is.*1.01"),
        (("confidence", [0.5, -0.1]), {}, "exit 1 must be from 0 to 1.*-0.1"),
        (("entropy", 1.5), {}, "as the entropy divided by log C is.*1.5"),
        (("margin", 2), {}, "as the margin between two probabilities is.*2"),
        (("ensemble", math.inf), {}, "as the ensemble's largest probability is.*inf"),
        (("confidence", math.nan), {}, "from 0 to 1.*nan"),
        (("confidence", True), {}, "from 0 to 1.*True"),
        (("confidence", [0.5, "0.5"]), {}, "from 0 to 1.*'0.5'"),
        (("patience", -1), {}, "patience must be a whole number of at least 0.*-1"),
        (("patience", 1.0), {}, "patience must be a whole number.*1.0"),
        (("patience", True), {}, "patience must be a whole number.*True"),
        (("patience", math.nan), {}, "patience must be a whole number.*nan"),
        (("patience", [1, 2]), {}, r"share one patience, got \[1, 2\]"),
        (("patience", [1, None]), {}, "share one patience"),
        (("confidence", 0.5), {"temperatures": [1.0, 1.0]}, "temperatures must be 3 numbers.*got 2"),
        (("confidence", 0.5), {"temperatures": 0}, "temperature of exit 0 must be a positive finite number, got 0"),
        (("confidence", 0.5), {"temperatures": [1, 1, -2]}, "temperature of exit 2 .* got -2"),
        (("confidence", 0.5), {"temperatures": math.inf}, "positive finite"),
        (("confidence", 0.5), {"temperatures": math.nan}, "positive finite"),
        (("confidence", 0.5), {"temperatures": True}, "positive finite"),
        (("confidence", 0.5), {"temperatures": 10**400}, "positive finite"),
        (("ensemble", 0.5), {"weights": [[1.0] * 3] * 2}, "weights must have 3 rows.*got 2"),
        (("ensemble", 0.5), {"weights": [[1.0], [1.0] * 2, [1.0] * 3]}, "row 0 of weights must have 3 numbers.*1"),
        (("ensemble", 0.5), {"weights": [[1.0] * 3, [1, 0, 1], [1] * 3]}, "row 1 of weights must be positive.*0"),
        (("ensemble", 0.5), {"weights": [[1.0] * 3, [1] * 3, [1, 1, math.nan]]}, "row 2 of weights.*nan"),
        (("ensemble", 0.5), {"weights": 1.0}, "weights must be a list"),
        (("ensemble", 0.5), {"log_bias": [[0.0] * 4] * 2}, "log_bias must have 3 rows.*got 2"),
        (("ensemble", 0.5), {"log_bias": [[0.0] * 4, [0.0] * 4, [0.0] * 5]}, "log_bias must be as many finite numbers"),
        (("ensemble", 0.5), {"log_bias": [[0.0, "0"]] * 3}, "log_bias must be as many finite numbers"),
        (("ensemble", 0.5), {"log_bias": ["ab"] * 3}, "row of log_bias must be a list"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, settings, words):
    with pytest.raises(ValueError, match=words):
        build_policy(*arguments, **({"exits": 3} | settings))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", POLICIES)
def test_logits_that_are_not_finite_are_refused_by_their_exit(kind, value):
    logits = logits_of()
    logits[2, 4, 1] = value
    policy = build_policy(kind, None, exits=E)
    with pytest.raises(ValueError, match="logits of exit 2 hold NaN or infinity"):
        run(policy, logits)
    with pytest.raises(ValueError, match="logits of exit 2 hold NaN or infinity"):
        policy.scores(logits)
    with pytest.raises(ValueError, match="exit 0 divided by its temperature 1e-50 hold NaN or infinity"):
        policy.with_temperatures(1e-50).decide(0, logits[0].float(), {})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda policy: policy.decide(2, torch.zeros(1, 3), {}), "exit must be 0 to 1.*got 2"),
        (lambda policy: policy.decide(-1, torch.zeros(1, 3), {}), "exit must be 0 to 1.*got -1"),
        (lambda policy: policy.decide(0, torch.zeros(3), {}), r"floats \(B, C\).*\(3,\)"),
        (lambda policy: policy.decide(0, torch.zeros(2, 1), {}), "at least 2 classes"),
        (lambda policy: policy.decide(0, torch.zeros(2, 3, dtype=torch.int64), {}), "must be floats.*int64"),
        (lambda policy: policy.scores(torch.zeros(3, 1, 3)), "policy has 2 exits.*logits hold 3.*give 2 thresholds"),
        (lambda policy: policy.scores(torch.zeros(1, 3)), r"must be \(E, B, C\)"),
        (lambda policy: policy.with_thresholds([0.5, 0.5]), "thresholds must be 1 numbers.*got 2"),
        (lambda policy: policy.with_temperatures([1.0]), "temperatures must be 2 numbers.*got 1"),
    ],
)
def test_what_does_not_fit_the_policy_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(build_policy("confidence", 0.5, exits=2))


def test_state_of_other_exits_samples_or_classes_is_refused():
    logits, bias = logits_of(), [[0.0] * 3] * E
    patience, ensemble = build_policy("patience", 1, exits=E), build_policy("ensemble", 0.5, exits=E)
    fresh = {policy: policy.start(B, C, logits[0]) for policy in (patience, ensemble)}
    for policy, words in ((patience, "state of the exit before exit 1"), (ensemble, "all 1 exits before exit 1")):
        with pytest.raises(ValueError, match=words):
            policy.decide(1, logits[1], {})
        with pytest.raises(ValueError, match="for the same"):
            policy.decide(0, logits[0, :3], fresh[policy])
    with pytest.raises(ValueError, match="all 1 exits before exit 1"):
        ensemble.decide(1, logits[1], fresh[ensemble])
    with pytest.raises(ValueError, match=r"at exit 0 a patience policy needs the state of start\(\)"):
        patience.decide(0, logits[0], patience.decide(0, logits[0], fresh[patience]).state)
    with pytest.raises(ValueError, match=f"same {B} samples and 2 classes"):
        ensemble.decide(0, logits[0, :, :2], fresh[ensemble])
    biased = EnsemblePolicy((0.5,) * 3, log_bias=bias)
    with pytest.raises(ValueError, match=f"logits of exit 0 have {C} classes, the ensemble's log_bias 3"):
        biased.scores(logits)


def test_policies_are_values():
    assert isinstance(PatiencePolicy([1, 1]), ExitPolicy)
    assert len({*EXAMPLES, *map(policy_from_dict, (policy.to_dict() for policy in EXAMPLES))}) == len(EXAMPLES)
    assert build_policy("confidence", 0.5, exits=3) != build_policy("margin", 0.5, exits=3)
