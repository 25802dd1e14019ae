from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cleave.lightning_modules import Entropic, FeatureTerm, GeneralizedHeadDistillation, KnowledgeDistillation
from cleave.losses import HeadDistillationLoss, KnowledgeDistillationLoss

from .split_tasks import (
    ADAM,
    NAMES,
    OBJECTIVES,
    VARIANCE,
    Logged,
    backbone,
    batch,
    build,
    changed,
    cross_entropy,
    double,
    fit,
    log_softmax,
    snapshot,
    squared_error,
    taught,
    teacher,
    terms_of,
    without_prior,
)

IMAGES, LABELS = batch(torch.float64)


@pytest.mark.parametrize("network", [{}, {"form": "insert"}, {"codec": {"kind": "entropy"}}, VARIANCE])
@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_the_loss_is_the_surveys_equations_3_and_4(direction: str, network: dict[str, Any]) -> None:
    objective = KnowledgeDistillationLoss(alpha=0.3, temperature=2.5, direction=direction)
    other = backbone(seed=1)
    settings = {"objective": objective, "teacher": teacher(other), **without_prior(network)}
    task = double(build(KnowledgeDistillation, network, **settings))
    terms, found = terms_of(task, IMAGES, LABELS)
    log_q, log_p = (log_softmax(logits / 2.5) for logits in (found["logits"], taught(IMAGES, other)["logits"]))
    first, second = (log_p, log_q) if direction == "teacher_student" else (log_q, log_p)
    divergence = (np.exp(first) * (first - second)).sum(1).mean()
    expected = 0.3 * cross_entropy(found["logits"], LABELS) + 0.7 * 2.5**2 * divergence
    assert terms == {"distillation": pytest.approx(expected, rel=1e-9)}


def test_features_may_be_compared_as_well() -> None:
    extra = {"feature": FeatureTerm(HeadDistillationLoss(), "layer2", weight=0.1)}
    terms, found = terms_of(double(build(KnowledgeDistillation, extra_terms=extra)), IMAGES, LABELS)
    assert terms["feature"] == pytest.approx(0.1 * squared_error(found["layer2"], taught(IMAGES)["layer2"]), rel=1e-9)


def test_it_fine_tunes_what_generalized_head_distillation_left() -> None:
    first, logged = build(GeneralizedHeadDistillation), Logged()
    fit(first, epochs=1)
    before = snapshot(first.network)
    objective = OBJECTIVES[KnowledgeDistillation]()
    second = KnowledgeDistillation(first.network, NAMES, ADAM, teacher=teacher(), **objective)
    fit(second, [logged], epochs=1)
    assert changed(before, second.network) == set(before) - {"quantizer.initialized"}
    fresh = Logged()
    fit(build(KnowledgeDistillation), [fresh], epochs=1)
    assert logged.losses()[0] != fresh.losses()[0]


def test_the_entropic_students_second_stage_leaves_every_payload_as_it_was() -> None:
    first = build(Entropic, {"codec": {"kind": "entropy"}})
    fit(first, epochs=2)
    network = first.network.eval()
    images, _ = batch()
    payloads, logits = network.codec.encode(network.codes(images)), network(images)
    task = KnowledgeDistillation(
        network, NAMES, ADAM, teacher=teacher(), train=["decoder", "tail"], **OBJECTIVES[KnowledgeDistillation]()
    )
    fit(task, epochs=2)
    network.eval()
    assert network.codec.encode(network.codes(images)) == payloads
    assert not torch.allclose(network(images), logits, rtol=0.1)
