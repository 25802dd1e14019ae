import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from cleave.losses import KnowledgeDistillationLoss
from cleave.losses.knowledge_distillation import DIRECTIONS


def batch(b=6, k=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, b, k, generator=generator, dtype=dtype)
    return student, teacher, torch.arange(b) % k


def reference(student, teacher, labels, alpha, tau, direction):
    """The textbook formula in float64, by SciPy's softmax and relative entropy."""
    s, t, y = student.double().numpy(), teacher.double().numpy(), labels.numpy()
    entropy = -np.log(softmax(s, axis=1)[np.arange(len(y)), y]).mean()
    q, p = softmax(s / tau, axis=1), softmax(t / tau, axis=1)
    divergence = rel_entr(p, q) if direction == "teacher_student" else rel_entr(q, p)
    return alpha * entropy + (1 - alpha) * tau**2 * divergence.sum(1).mean()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("tau", [0.5, 1, 4.0])
def test_equals_the_float64_reference(direction, alpha, tau):
    student, teacher, labels = batch()
    expected = reference(student, teacher, labels, alpha, tau, direction)
    loss = KnowledgeDistillationLoss(alpha, tau, direction)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-10)
    assert loss(student.float(), teacher.float(), labels).item() == pytest.approx(expected, rel=1e-6)


def test_the_two_directions_differ_and_hintons_is_the_default():
    measured = {d: KnowledgeDistillationLoss(direction=d)(*batch()) for d in DIRECTIONS}
    assert abs(measured["teacher_student"] - measured["student_teacher"]) > 0.1
    assert KnowledgeDistillationLoss()(*batch()) == measured["teacher_student"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_gradient_is_exact_and_stays_out_of_the_teacher(direction, alpha):
    student, teacher, labels = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    loss = KnowledgeDistillationLoss(alpha, 2.0, direction)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), student)
    loss(student, teacher, labels).backward()
    assert teacher.grad is None


def test_two_equal_networks_leave_the_cross_entropy():
    student, _, labels = batch()
    expected = 0.25 * torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(KnowledgeDistillationLoss(alpha=0.25)(student, student, labels), expected)


def test_the_gradient_of_the_softened_term_keeps_its_size_at_high_temperature():
    # At high temperature τ² KL tends to half the mean squared difference of centred logits, whatever τ.
    student, teacher, labels = batch()
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = centred.square().mean(1).mean() / 2
    assert KnowledgeDistillationLoss(0, 1e4)(student, teacher, labels).item() == pytest.approx(limit.item(), rel=1e-3)


def test_a_term_of_weight_zero_lets_no_nan_in():
    student, teacher, labels = batch()
    nan = torch.full_like(teacher, math.nan)
    assert KnowledgeDistillationLoss(alpha=1)(student, nan, labels).isfinite()
    beyond = torch.full_like(labels, 99)
    assert KnowledgeDistillationLoss(alpha=0)(student, teacher, beyond).isfinite()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_far_apart_stay_finite(direction):
    student = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = KnowledgeDistillationLoss(0.5, 1.0, direction)(student, -student.detach(), torch.tensor([2]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    student, teacher, labels = batch()
    student, teacher = student.to(dtype), (100 * teacher).to(dtype)
    expected = reference(student, teacher, labels, 0.5, 4.0, "teacher_student")
    loss = KnowledgeDistillationLoss()(student, teacher, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0\.1"),
        ({"alpha": 1.5}, r"alpha.*got 1\.5"),
        ({"alpha": math.nan}, "alpha.*got nan"),
        ({"temperature": 0}, "temperature.*got 0"),
        ({"temperature": -1.0}, "temperature.*got -1"),
        ({"temperature": math.inf}, "temperature.*got inf"),
        ({"temperature": math.nan}, "temperature.*got nan"),
        ({"direction": "both"}, "teacher_student, student_teacher, got 'both'"),
    ],
)
def test_bad_arguments_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        KnowledgeDistillationLoss(**settings)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_logits_that_do_not_fit_are_refused(alpha):
    loss = KnowledgeDistillationLoss(alpha)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*another number of classes"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4), labels)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\).*same batch"):
        loss(torch.zeros(2, 3), torch.zeros(4, 3), labels)
    with pytest.raises(ValueError, match=r"must both be \(B, K\)"):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), labels)
