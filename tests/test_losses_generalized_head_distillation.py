import math

import numpy as np
import pytest
import torch

from cleave.losses import GeneralizedHeadDistillationLoss, HeadDistillationLoss

WEIGHTS = {"layer2": 1.0, "layer3.0": 0.25}
SHAPES = {"layer2": (4, 3, 8, 8), "layer3.0": (4, 7)}


def total(terms):
    return torch.stack(list(terms.values())).sum()


def features(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=dtype) for n, shape in SHAPES.items()}


def test_equals_the_float64_reference_term_by_term():
    student, teacher = features(0), features(1)
    expected = {
        n: weight * np.square(student[n].numpy() - teacher[n].numpy()).sum() / 4 for n, weight in WEIGHTS.items()
    }
    loss = GeneralizedHeadDistillationLoss(WEIGHTS)
    terms = loss(student, teacher)
    assert list(terms) == list(WEIGHTS)
    assert {n: term.item() for n, term in terms.items()} == pytest.approx(expected, rel=1e-12)
    assert total(terms).item() == pytest.approx(sum(expected.values()), rel=1e-12)


def test_single_precision_agrees_to_a_millionth():
    student, teacher = features(0, torch.float32), features(1, torch.float32)
    double = [{n: f.double() for n, f in side.items()} for side in (student, teacher)]
    loss = GeneralizedHeadDistillationLoss(WEIGHTS)
    assert total(loss(student, teacher)).item() == pytest.approx(total(loss(*double)).item(), rel=1e-6)


def test_one_layer_of_weight_one_is_head_distillation():
    student, teacher = features(0), features(1)
    measured = GeneralizedHeadDistillationLoss({"layer2": 1})(student, teacher)["layer2"]
    assert torch.equal(measured, HeadDistillationLoss()(student["layer2"], teacher["layer2"]))


def test_gradient_is_exact_and_stays_out_of_the_teacher():
    student = {n: f[:2, :2].clone().requires_grad_() for n, f in features(0).items()}
    teacher = {n: f[:2, :2].clone().requires_grad_() for n, f in features(1).items()}
    loss = GeneralizedHeadDistillationLoss(WEIGHTS)
    assert torch.autograd.gradcheck(
        lambda *s: total(loss(dict(zip(WEIGHTS, s, strict=True)), teacher)), [student[n] for n in WEIGHTS]
    )
    total(loss(student, teacher)).backward()
    assert all(f.grad is None for f in teacher.values())


def test_a_layer_of_weight_zero_is_not_needed():
    loss = GeneralizedHeadDistillationLoss({"layer2": 2.0, "layer4": 0.0})
    assert loss.weights == {"layer2": 2.0}
    assert list(loss(features(0), features(1))) == ["layer2"]


def test_layers_that_are_not_named_are_ignored():
    student, teacher = features(0), features(1)
    one = GeneralizedHeadDistillationLoss({"layer3.0": 1})
    before = one(student, teacher)["layer3.0"]
    student["layer2"].fill_(math.nan)
    assert torch.equal(one(student, teacher)["layer3.0"], before)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    student, teacher = ({n: (100 * f).to(dtype) for n, f in features(seed).items()} for seed in (0, 1))
    expected = sum(
        w * (student[n].double() - teacher[n].double()).square().sum().item() / 4 for n, w in WEIGHTS.items()
    )
    assert expected > torch.finfo(torch.half).max
    measured = total(GeneralizedHeadDistillationLoss(WEIGHTS)(student, teacher))
    assert measured.dtype == torch.float32
    assert measured.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [-0.5, math.inf, math.nan])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=f"'layer3' must have a finite weight of at least 0, got {weight}"):
        GeneralizedHeadDistillationLoss({"layer2": 1.0, "layer3": weight})


@pytest.mark.parametrize("weights", [{}, {"layer2": 0.0, "layer3": 0}])
def test_weights_that_compare_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="at least one layer a weight above 0"):
        GeneralizedHeadDistillationLoss(weights)


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_layer_that_one_lacks_is_named_with_its_near_matches(owner):
    sides = {"student": features(0), "teacher": features(1)}
    sides[owner]["layer3.1"] = sides[owner].pop("layer3.0")
    with pytest.raises(ValueError, match=rf"'layer3\.0'.*{owner}'s features.*Did you mean 'layer3\.1'"):
        GeneralizedHeadDistillationLoss(WEIGHTS)(**sides)
    sides[owner].clear()
    with pytest.raises(ValueError, match=r"'layer2'.*no layer\.$"):
        GeneralizedHeadDistillationLoss(WEIGHTS)(**sides)


def test_shapes_that_differ_are_refused_by_layer():
    student, teacher = features(0), features(1)
    teacher["layer3.0"] = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"layer 'layer3\.0': .*\(4, 7\).*\(4, 8\)"):
        GeneralizedHeadDistillationLoss(WEIGHTS)(student, teacher)
