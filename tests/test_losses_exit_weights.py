import math

import pytest
import torch

from cleave.losses import ExitDistillationLoss, JointExitLoss

EXITS = ["layer1", "layer2", "final"]
COSTS = [0.2, 0.55, 1.0]


@pytest.fixture(params=[JointExitLoss, lambda *a, **k: ExitDistillationLoss("next", *a, **k)], ids=["joint", "distil"])
def build(request):
    """Either loss with its weights given by keyword."""
    return request.param


def logits(exits=3):
    return torch.randn(exits, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("equal", [1, 1, 1]),
        ("branchynet", [1, 1, 0.3]),
        ("final", [0, 0, 1]),
        ("linear", [1 / 6, 2 / 6, 3 / 6]),
        ([0.5, 0, 2], [0.5, 0, 2]),
    ],
)
@pytest.mark.parametrize("bound", [True, False])
def test_constant_weights_need_no_binding(build, weights, expected, bound):
    loss = build(weights=weights)
    if bound:
        loss.bind(EXITS, COSTS)
    for progress in (0, 0.3, 1):
        assert loss.weights_at(3, progress).tolist() == pytest.approx(expected, rel=1e-7)
    assert not list(loss.parameters())


def test_presets_follow_the_number_of_exits():
    assert JointExitLoss("linear").weights_at(4, 1.0).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert JointExitLoss("branchynet").weights_at(2, 1.0).tolist() == pytest.approx([1, 0.3])
    assert JointExitLoss("linear").weights_at(1, 1.0).tolist() == [1]


def test_shallow_deep_grows_linearly_from_a_hundredth_to_the_cost(build):
    loss = build(weights="shallow_deep")
    loss.bind(EXITS, COSTS)
    for progress, expected in {0: [0.01, 0.01, 1], 1: COSTS, 0.25: [0.0575, 0.145, 1]}.items():
        assert loss.weights_at(3, progress).tolist() == pytest.approx(expected, rel=1e-6)
    other = build(weights="shallow_deep", start=0.5)
    other.bind(EXITS, COSTS)
    assert other.weights_at(3, 0).tolist() == [0.5, 0.5, 1]
    assert other.weights_at(3, 1).tolist() == pytest.approx(COSTS)


def test_learned_weights_begin_at_one_and_outlive_a_second_binding(build):
    loss = build(weights="learned")
    loss.bind(EXITS)
    assert list(loss.state_dict()) == ["log_scales"]
    assert loss.weights_at(3, 0).tolist() == [1, 1, 1]
    with torch.no_grad():
        loss.log_scales.copy_(torch.tensor([0.0, math.log(2), -math.log(4)]))
    loss.bind(EXITS, COSTS)
    assert loss.weights_at(3, 1).tolist() == pytest.approx([1, 0.5, 4])
    assert not loss.weights_at(3, 1).requires_grad


@pytest.mark.parametrize("start", [-0.1, 1.5, math.nan])
def test_a_start_out_of_range_is_refused(build, start):
    with pytest.raises(ValueError, match=rf"start must lie in \[0, 1\], got {start}"):
        build(weights="shallow_deep", start=start)


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        (
            "branchinet",
            "equal, branchynet, linear, final, shallow_deep, learned.*got 'branchinet'.*Did you mean 'branchynet'",
        ),
        ("xyz", r"got 'xyz'\.$"),
        (2.0, "one number per exit; got 2.0"),
        (["much", 1], "one number per exit; got .*'much'"),
        ([1, -0.5], "exit 2 must have a finite weight of at least 0, got -0.5"),
        ([math.nan, 1], "exit 1.*got nan"),
        ([1, math.inf], "exit 2.*got inf"),
        ([0, 0.0], "at least one exit a weight above 0"),
        ([], "at least one exit a weight above 0"),
    ],
)
def test_bad_weights_are_named(build, weights, named):
    with pytest.raises(ValueError, match=named):
        build(weights=weights)


def test_a_wrong_number_of_weights_is_refused(build):
    named = "weights has 2 numbers, but there are 3 exits; give one weight per exit, the final classifier last"
    loss = build(weights=[1, 2])
    with pytest.raises(ValueError, match=named):
        loss.bind(EXITS)
    with pytest.raises(ValueError, match=named):
        loss(logits(), torch.arange(4))
    with pytest.raises(ValueError, match=named):
        loss.weights_at(3, 0.5)


def test_a_bound_loss_keeps_to_its_network(build):
    loss = build(weights="equal")
    loss.bind(EXITS)
    with pytest.raises(ValueError, match="bound to 3 exits, got 2"):
        loss(logits(2), torch.arange(4))
    with pytest.raises(ValueError, match="bound to 3 exits, got 2"):
        loss.bind(EXITS[1:])


@pytest.mark.parametrize("weights", ["shallow_deep", "learned"])
def test_weights_of_a_network_must_be_bound(build, weights):
    with pytest.raises(ValueError, match=f"'{weights}' is not bound.*call bind"):
        build(weights=weights)(logits(), torch.arange(4))
    with pytest.raises(ValueError, match=f"'{weights}' is not bound.*call bind"):
        build(weights=weights).weights_at(3, 0.5)


@pytest.mark.parametrize(
    ("exits", "costs", "named"),
    [
        ([], None, r"exits must be the names of all exits, the final classifier last, got \[\]"),
        (True, None, "exits.*got True"),
        ("final", None, "exits.*got 'final'"),
        (3, None, r"exits.*got 3"),
        (["layer1", "layer1"], None, "exits.*'layer1', 'layer1'"),
        (EXITS, None, "'shallow_deep' needs costs, got None"),
        (EXITS, [0.5, 1.0], "costs has 2 numbers, but there are 3 exits"),
        (EXITS, [0.0, 0.5, 1.0], r"costs must rise within \(0, 1\] and end at 1, got \[0\.0"),
        (EXITS, [0.6, 0.5, 1.0], "costs must rise"),
        (EXITS, [0.2, 0.5, 0.9], "costs.*end at 1"),
        (EXITS, [0.2, 1.5, 1.0], "costs must rise"),
        (EXITS, [0.2, math.nan, 1.0], "costs must rise"),
    ],
)
def test_a_bad_binding_is_refused(exits, costs, named):
    with pytest.raises(ValueError, match=named):
        JointExitLoss("shallow_deep").bind(exits, costs)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_out_of_range_is_refused(build, progress):
    loss = build(weights="equal")
    with pytest.raises(ValueError, match=rf"progress must lie in \[0, 1\], got {progress}"):
        loss(logits(), torch.arange(4), progress=progress)
    with pytest.raises(ValueError, match="progress"):
        loss.weights_at(3, progress)


@pytest.mark.parametrize(
    "outputs", [[], [torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2, 3), torch.zeros(1, 3)], torch.zeros(2, 3)]
)
def test_outputs_that_do_not_fit_are_refused(build, outputs):
    with pytest.raises(ValueError, match=r"logits must be one \(B, K\) for each exit"):
        build()(outputs, torch.zeros(2, dtype=torch.int64))


def test_an_unbound_loss_numbers_the_exits(build):
    assert list(build(weights="equal")(logits(), torch.arange(4))) == ["1", "2", "final"]


def test_only_growing_weights_follow_the_progress(build):
    assert build(weights="shallow_deep").follows_progress
    assert not build(weights="linear").follows_progress
