from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cleave.lightning_modules import (
    FeaturesTerm,
    FeatureTerm,
    GaussianTerm,
    LabelTerm,
    LogitsTerm,
    RateTerm,
    ReconstructionTerm,
    Term,
)
from cleave.lightning_modules.terms import Seen
from cleave.losses import (
    GeneralizedHeadDistillationLoss,
    HeadDistillationLoss,
    InformationBottleneckLoss,
    KnowledgeDistillationLoss,
    RateLoss,
    ReconstructionLoss,
)

SEEN = Seen(
    torch.tensor([1, 0]),
    {
        "logits": torch.tensor([[1.0, 0.0], [2.0, 0.0]]),
        "layer2": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "layer3": torch.ones(2, 3),
        "head": torch.tensor([[4.0, 6.0], [3.0, 4.0]]),
        "likelihoods": torch.full((2, 8), 0.25),
        "mean": torch.ones(2, 4),
        "log_variance": torch.zeros(2, 4),
    },
    {"logits": torch.zeros(2, 2), "layer2": torch.tensor([[1.0, 0.0], [0.0, 4.0]]), "layer3": torch.zeros(2, 3)},
)
CROSS_ENTROPY = (math.log(1 + math.e) + math.log(1 + math.exp(-2))) / 2

# each term, what it asks of student and teacher, and its unweighted value by hand
TERMS = {
    "label": (lambda w: LabelTerm(nn.CrossEntropyLoss(), w), {"logits"}, set(), CROSS_ENTROPY),
    "logits": (lambda w: LogitsTerm(KnowledgeDistillationLoss(1.0), w), {"logits"}, {"logits"}, CROSS_ENTROPY),
    "feature": (lambda w: FeatureTerm(HeadDistillationLoss(), "layer2", w), {"layer2"}, {"layer2"}, (4 + 9) / 2),
    "reconstruction": (
        lambda w: ReconstructionTerm(ReconstructionLoss(epsilon=0), "layer2", w),
        {"head", "layer2"},
        set(),
        (5 + 0) / 2,
    ),
    "rate": (lambda w: RateTerm(RateLoss(pixels=16), w), {"likelihoods"}, set(), 8 * 2 / 16),
    "gaussian": (lambda w: GaussianTerm(InformationBottleneckLoss(), w), {"mean", "log_variance"}, set(), 4 * 0.5),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_a_term_asks_for_what_it_needs_and_weighs_its_loss(name: str, weight: float) -> None:
    make, student, teacher, expected = TERMS[name]
    term: Term = make(weight)
    assert set(term.student) == student
    assert set(term.teacher) == teacher
    needed = Seen(SEEN.labels, {k: SEEN.student[k] for k in student}, {k: SEEN.teacher[k] for k in teacher})
    assert term(needed).item() == pytest.approx(expected, rel=1e-6)
    named = term.named("x", needed)
    assert named.keys() == {"x"}
    assert named["x"].item() == pytest.approx(weight * expected, rel=1e-6)


def test_features_are_named_by_layer() -> None:
    term = FeaturesTerm(GeneralizedHeadDistillationLoss({"layer3": 2.0, "layer2": 1.0, "layer1": 0.0}), weight=0.5)
    assert term.student == term.teacher == ("layer3", "layer2")  # a layer of weight 0 is not even computed
    named = {name: value.item() for name, value in term.named("head", SEEN).items()}
    assert named == {"head/layer3": pytest.approx(0.5 * 2 * 3), "head/layer2": pytest.approx(0.5 * 6.5)}
    assert term(SEEN).item() == pytest.approx(2 * 3 + 6.5)


def test_a_term_holds_its_objective_as_a_module() -> None:
    objective = nn.CrossEntropyLoss(weight=torch.ones(2))
    assert [*LabelTerm(objective).buffers()] == [objective.weight]


def test_labels_are_compared_in_single_precision() -> None:
    half = Seen(SEEN.labels, {"logits": SEEN.student["logits"].bfloat16()}, {})
    loss = LabelTerm(nn.CrossEntropyLoss())(half)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(CROSS_ENTROPY, rel=1e-6)


@pytest.mark.parametrize("weight", [-1.0, -1e-9, math.inf, math.nan])
@pytest.mark.parametrize("name", TERMS)
def test_weights_are_checked(name: str, weight: float) -> None:
    with pytest.raises(ValueError, match="the weight of a term must be a number of at least 0, got"):
        TERMS[name][0](weight)
