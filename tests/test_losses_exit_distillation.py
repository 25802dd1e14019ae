import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import nn

from cleave.losses import ExitDistillationLoss, KnowledgeDistillationLoss
from cleave.losses.exit_distillation import SOURCES

WEIGHTS = [0.5, 1.5, 2.0]


def batch(b=6, k=5, dtype=torch.float64):
    *logits, teacher = 3 * torch.randn(4, b, k, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return logits, torch.arange(b) % k, teacher


def total(terms):
    return torch.stack(list(terms.values())).sum()


def reference(logits, labels, teacher, source, alpha, tau):
    """Every exit's loss, unweighted, by SciPy's softmax and relative entropy in float64."""
    s, y = [x.detach().double().numpy() for x in logits], labels.numpy()
    sources = {"final": [s[2], s[2], None], "next": [s[1], s[2], None], "teacher": [teacher.double().numpy()] * 3}
    values = []
    for ours, theirs in zip(s, sources[source], strict=True):
        entropy = -np.log(softmax(ours, axis=1)[np.arange(len(y)), y]).mean()
        if theirs is None:
            values.append(entropy)
        else:
            divergence = rel_entr(softmax(theirs / tau, axis=1), softmax(ours / tau, axis=1)).sum(1).mean()
            values.append(alpha * entropy + (1 - alpha) * tau**2 * divergence)
    return np.array(values)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("tau", [1, 4.0])
def test_equals_the_float64_reference_term_by_term(source, alpha, tau):
    logits, labels, teacher = batch()
    expected = WEIGHTS * reference(logits, labels, teacher, source, alpha, tau)
    loss = ExitDistillationLoss(source, alpha, tau, weights=WEIGHTS)
    terms = loss(logits, labels, teacher_logits=teacher)
    assert [term.item() for term in terms.values()] == pytest.approx(expected, rel=1e-10)
    assert total(terms).item() == pytest.approx(expected.sum(), rel=1e-10)
    single = total(loss(torch.stack(logits).float(), labels, teacher_logits=teacher.float()))
    assert single.item() == pytest.approx(expected.sum(), rel=1e-6)


def test_the_weights_follow_the_training_and_can_be_learned():
    logits, labels, teacher = batch()
    single = reference(logits, labels, teacher, "next", 0.5, 4.0)
    loss = ExitDistillationLoss("next", weights="shallow_deep")
    loss.bind(["layer1", "layer2", "final"], [0.2, 0.5, 1.0])
    assert total(loss(logits, labels, progress=0)).item() == pytest.approx(single @ [0.01, 0.01, 1])
    assert total(loss(logits, labels)).item() == pytest.approx(single @ [0.2, 0.5, 1])
    loss = ExitDistillationLoss("next", weights="learned")
    loss.bind(["layer1", "layer2", "final"])
    total(loss(logits, labels)).backward()
    assert loss.log_scales.grad.tolist() == pytest.approx(1 - single, rel=1e-5)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("alpha", [0, 0.3])
def test_gradient_is_exact_and_stays_out_of_the_sources(source, alpha):
    logits, labels, teacher = batch(b=2)
    logits = [output.requires_grad_() for output in logits]
    teacher.requires_grad_()
    loss = ExitDistillationLoss(source, alpha, 2.0, weights=WEIGHTS)
    for j, term in enumerate(loss(logits, labels, teacher_logits=teacher).values()):
        gradients = torch.autograd.grad(term, [*logits, teacher], allow_unused=True)
        assert [g is not None for g in gradients] == [i == j for i in range(4)]
    # Each term by itself: a numeric gradient of the sum would also move the sources.
    for j in range(3):

        def term(output, j=j):
            outputs = [output if i == j else x.detach() for i, x in enumerate(logits)]
            return list(loss(outputs, labels, teacher_logits=teacher).values())[j]

        assert torch.autograd.gradcheck(term, logits[j])


@pytest.mark.parametrize("source", SOURCES)
def test_the_gradient_is_the_weighted_sum_of_the_gradients_of_single_exits(source):
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 4).double(), nn.ModuleList(nn.Linear(4, 5) for _ in range(3)).double()
    x, labels, teacher = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 5, batch()[2]
    shared = [trunk.weight, trunk.bias]

    def exits():
        features = trunk(x).tanh()
        return [head(features * (j + 1)) for j, head in enumerate(heads)]

    fixed = [output.detach() for output in exits()]
    target = {"final": [fixed[2], fixed[2], None], "next": [fixed[1], fixed[2], None], "teacher": [teacher] * 3}[source]
    distil = KnowledgeDistillationLoss(0.3, 2.0)

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, shared)])

    single = [
        gradient(nn.functional.cross_entropy(y, labels) if t is None else distil(y, t, labels))
        for y, t in ((exits()[j], target[j]) for j in range(3))
    ]
    expected = sum(weight * g for weight, g in zip(WEIGHTS, single, strict=True))
    loss = ExitDistillationLoss(source, 0.3, 2.0, weights=WEIGHTS)
    measured = gradient(total(loss(exits(), labels, teacher_logits=teacher)))
    torch.testing.assert_close(measured, expected, rtol=1e-10, atol=1e-12)


def test_the_final_classifier_keeps_its_whole_cross_entropy():
    logits, labels, _ = batch()
    expected = nn.functional.cross_entropy(logits[-1], labels)
    for source in ("final", "next"):
        assert torch.equal(ExitDistillationLoss(source, alpha=0.1)(logits, labels)["final"], expected)


def test_a_source_of_nan_stays_out_where_nobody_learns_from_it():
    logits, labels, teacher = batch()
    nan = torch.full_like(teacher, math.nan)
    assert total(ExitDistillationLoss("teacher", alpha=1)(logits, labels, teacher_logits=nan)).isfinite()
    assert total(ExitDistillationLoss("next", weights=[1, 0, 0])([logits[0], logits[1], nan], labels)).isfinite()


def test_only_a_teacher_is_needed_from_outside():
    assert {source: ExitDistillationLoss(source).needs_teacher for source in SOURCES} == {
        "final": False,
        "next": False,
        "teacher": True,
    }


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("source", SOURCES)
def test_half_precision_is_computed_in_single(dtype, source):
    logits, labels, teacher = batch()
    logits, teacher = [(10 * output).to(dtype) for output in logits], teacher.to(dtype)
    expected = reference(logits, labels, teacher, source, 0.5, 4.0).sum()
    measured = total(ExitDistillationLoss(source)(logits, labels, teacher_logits=teacher))
    assert measured.dtype == torch.float32
    assert measured.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"source": "last"}, "source must be one of final, next, teacher, got 'last'"),
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0\.1"),
        ({"alpha": math.nan}, "alpha.*got nan"),
        ({"temperature": 0}, "temperature.*got 0"),
        ({"temperature": math.inf}, "temperature.*got inf"),
    ],
)
def test_bad_arguments_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        ExitDistillationLoss(**settings)


def test_a_teacher_that_is_missing_or_does_not_fit_is_refused():
    logits, labels, teacher = batch()
    loss = ExitDistillationLoss("teacher")
    with pytest.raises(ValueError, match="'teacher' needs teacher_logits, got None"):
        loss(logits, labels)
    with pytest.raises(ValueError, match=r"\(6, 5\).*\(6, 4\).*another number of classes"):
        loss(logits, labels, teacher_logits=teacher[:, :4])
    with pytest.raises(ValueError, match=r"\(6, 5\).*\(2, 5\).*same batch"):
        loss(logits, labels, teacher_logits=teacher[:2])
