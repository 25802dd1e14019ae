from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cleave.architectures import entropy_codec
from cleave.lightning_modules import CrossEntropy, Term
from cleave.losses import HeadDistillationLoss

from .split_tasks import (
    Logged,
    batch,
    build,
    cross_entropy,
    double,
    fit,
    log_softmax,
    squared_error,
    taught,
    teacher,
    terms_of,
    without_prior,
)

IMAGES, LABELS = batch(torch.float64)


@pytest.mark.parametrize("codec", [{"bits": 4}, {"bits": 3, "range": "sample"}, entropy_codec, {"bits": 32}])
@pytest.mark.parametrize("form", ["replace", "insert", "none"])
def test_the_loss_is_the_labels_cross_entropy(form: str, codec: dict[str, Any]) -> None:
    network = {"form": form, "codec": codec}
    terms, found = terms_of(double(build(CrossEntropy, network, **without_prior(network))), IMAGES, LABELS)
    assert terms == {"cross_entropy": pytest.approx(cross_entropy(found["logits"], LABELS), rel=1e-6)}


def test_the_loss_may_be_any_of_labels() -> None:
    task = double(build(CrossEntropy, loss=nn.CrossEntropyLoss(label_smoothing=0.2)))
    terms, found = terms_of(task, IMAGES, LABELS)
    smoothed = 0.8 * cross_entropy(found["logits"], LABELS) - 0.2 * log_softmax(found["logits"]).mean()
    assert terms["cross_entropy"] == pytest.approx(smoothed, rel=1e-6)


def test_a_distance_to_the_teachers_features_may_be_added() -> None:
    extra = {"l2": Term(HeadDistillationLoss(), ["student/layer3", "teacher/layer3"], weight=0.01)}
    terms, found = terms_of(double(build(CrossEntropy, others=teacher(), extra_terms=extra)), IMAGES, LABELS)
    assert terms == {
        "cross_entropy": pytest.approx(cross_entropy(found["logits"], LABELS), rel=1e-6),
        "l2": pytest.approx(0.01 * squared_error(found["layer3"], taught(IMAGES)["layer3"]), rel=1e-9),
    }


def test_labels_are_learned_without_a_teacher() -> None:
    logged = Logged()
    fit(build(CrossEntropy), [logged], epochs=8, limit_val_batches=0)
    losses = logged.losses()
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_a_tail_in_eval_mode_gives_its_running_statistics() -> None:
    frozen, trained = (double(build(CrossEntropy, train=train)) for train in (["bottleneck"], None))
    (one, found), (other, _) = (terms_of(task, IMAGES, LABELS) for task in (frozen, trained))
    assert one["cross_entropy"] == pytest.approx(cross_entropy(found["logits"], LABELS), rel=1e-6)
    assert one["cross_entropy"] != pytest.approx(other["cross_entropy"], rel=1e-3)
