import numpy as np
import pytest
import torch

from cleave.losses import HeadDistillationLoss


def test_equals_the_float64_sum_per_sample():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 3, 4, 4))
    expected = ((student - teacher) ** 2).sum() / 5
    measured = HeadDistillationLoss()(torch.tensor(student), torch.tensor(teacher))
    assert measured.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_exact_and_stays_out_of_the_teacher():
    student = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: HeadDistillationLoss()(s, teacher), student)
    HeadDistillationLoss()(student, teacher).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (2 * (student - teacher) / 2).detach())


def test_does_not_depend_on_how_often_a_batch_is_repeated():
    student, teacher = torch.randn(2, 4, 7)
    once = HeadDistillationLoss()(student, teacher)
    twice = HeadDistillationLoss()(student.repeat(2, 1), teacher.repeat(2, 1))
    torch.testing.assert_close(once, twice)


def test_half_precision_is_summed_in_single():
    student, teacher = torch.randn(2, 2, 64, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    expected = (student.double() - teacher.double()).square().sum() / 2
    assert expected > torch.finfo(torch.half).max
    torch.testing.assert_close(HeadDistillationLoss()(student, teacher).double(), expected, rtol=1e-5, atol=0)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*same cut"):
        HeadDistillationLoss()(torch.zeros(2, 3), torch.zeros(2, 4))
