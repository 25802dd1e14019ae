from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cleave.architectures import entropy_codec
from cleave.lightning_modules import Entropic, GeneralizedHeadDistillation, KnowledgeDistillation, Term
from cleave.losses import HeadDistillationLoss, KnowledgeDistillationLoss

from .split_tasks import (
    LOSSES,
    VARIANCE,
    Logged,
    backbone,
    batch,
    bottleneck_of,
    build,
    changed,
    codes,
    cross_entropy,
    double,
    fit,
    log_softmax,
    snapshot,
    squared_error,
    taught,
    teacher,
    terms_of,
    training,
    without_prior,
)

IMAGES, LABELS = batch(torch.float64)


@pytest.mark.parametrize("network", [{}, {"form": "insert"}, {"codec": entropy_codec}, VARIANCE])
@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_the_loss_is_the_surveys_equations_3_and_4(direction: str, network: dict[str, Any]) -> None:
    loss = KnowledgeDistillationLoss(alpha=0.3, temperature=2.5, direction=direction)
    other = backbone(seed=1)
    settings = {"loss": loss, "others": teacher(other), **without_prior(network)}
    task = double(build(KnowledgeDistillation, network, **settings))
    terms, found = terms_of(task, IMAGES, LABELS)
    log_q, log_p = (log_softmax(logits / 2.5) for logits in (found["logits"], taught(IMAGES, other)["logits"]))
    first, second = (log_p, log_q) if direction == "teacher_student" else (log_q, log_p)
    divergence = (np.exp(first) * (first - second)).sum(1).mean()
    expected = 0.3 * cross_entropy(found["logits"], LABELS) + 0.7 * 2.5**2 * divergence
    assert terms == {"distillation": pytest.approx(expected, rel=1e-9)}


def test_features_may_be_compared_as_well() -> None:
    extra = {"feature": Term(HeadDistillationLoss(), ["student/layer2", "teacher/layer2"], weight=0.1)}
    terms, found = terms_of(double(build(KnowledgeDistillation, extra_terms=extra)), IMAGES, LABELS)
    assert terms["feature"] == pytest.approx(0.1 * squared_error(found["layer2"], taught(IMAGES)["layer2"]), rel=1e-9)


def test_it_fine_tunes_what_generalized_head_distillation_left() -> None:
    first, logged = build(GeneralizedHeadDistillation), Logged()
    fit(first, epochs=1)
    before = snapshot(first.network)
    loss = LOSSES[KnowledgeDistillation]()
    second = KnowledgeDistillation(first.network, others=teacher(), training=training(), **loss)
    fit(second, [logged], epochs=1)
    assert changed(before, second.network) == set(before) - {"at:layer2.bottleneck.quantizer.initialized"}
    fresh = Logged()
    fit(build(KnowledgeDistillation), [fresh], epochs=1)
    assert logged.losses()[0] != fresh.losses()[0]


def test_the_entropic_students_second_stage_leaves_every_payload_as_it_was() -> None:
    first = build(Entropic, {"codec": entropy_codec})
    fit(first, epochs=2)
    network = first.network.eval()
    images, _ = batch()
    codec = bottleneck_of(network).codec
    payloads, logits = codec.encode(codes(network, images)), network(images)
    task = KnowledgeDistillation(
        network, others=teacher(), train=["decoder", "tail"], training=training(), **LOSSES[KnowledgeDistillation]()
    )
    fit(task, epochs=2)
    network.eval()
    assert codec.encode(codes(network, images)) == payloads
    assert not torch.allclose(network(images), logits, rtol=0.1)
