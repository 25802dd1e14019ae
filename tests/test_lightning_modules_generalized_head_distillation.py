from __future__ import annotations

from typing import Any

import pytest
import torch

from cleave.lightning_modules import GeneralizedHeadDistillation, HeadDistillation, Term
from cleave.losses import GeneralizedHeadDistillationLoss

from .split_tasks import (
    Logged,
    backbone,
    batch,
    bottleneck_of,
    build,
    double,
    fit,
    losses,
    parts_of,
    squared_error,
    taught,
    teacher,
    terms_of,
)

IMAGES, LABELS = batch(torch.float64)


def compare(**weights: float) -> dict[str, Any]:
    return {"loss": GeneralizedHeadDistillationLoss(weights)}


@pytest.mark.parametrize("codec", [{"bits": 4}, {"bits": 3, "range": "sample"}, {"bits": 4, "widths": [2, 4]}])
@pytest.mark.parametrize("form", ["replace", "insert"])
def test_the_terms_are_the_surveys_equation_7(form: str, codec: dict[str, Any]) -> None:
    other = backbone(seed=1)  # were teacher and student of the same weights, a mix-up of the two would not show
    settings = compare(layer2=0.7, layer3=1.3) | {"others": teacher(other)}
    task = double(build(GeneralizedHeadDistillation, {"form": form, "codec": codec}, **settings))
    task.network.set_bits(4)
    terms, found = terms_of(task, IMAGES, LABELS)
    theirs = taught(IMAGES, other)
    assert terms == {
        "head/layer2": pytest.approx(0.7 * squared_error(found["layer2"], theirs["layer2"]), rel=1e-9),
        "head/layer3": pytest.approx(1.3 * squared_error(found["layer3"], theirs["layer3"]), rel=1e-9),
    }


def test_the_logits_may_be_compared() -> None:
    terms, found = terms_of(double(build(GeneralizedHeadDistillation, **compare(logits=2.0))), IMAGES, LABELS)
    assert terms["head/logits"] == pytest.approx(2 * squared_error(found["logits"], taught(IMAGES)["logits"]), rel=1e-9)


def test_one_layer_of_weight_1_is_head_distillation() -> None:
    general, plain = Logged(), Logged()
    fit(build(GeneralizedHeadDistillation, **compare(layer2=1.0)), [general])
    fit(build(HeadDistillation), [plain])
    assert general.losses() == pytest.approx(plain.losses(), rel=1e-6)


def test_the_gradient_reaches_the_encoder_through_the_frozen_tail() -> None:
    task = build(GeneralizedHeadDistillation, **compare(layer3=1.0))
    task.set_modes()
    losses(task, *batch())["head/layer3"].backward()
    for part in (bottleneck_of(task.network).encoder, bottleneck_of(task.network).decoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(p.grad is None for p in parts_of(task.network)["tail"].parameters())


def test_each_layer_is_logged_by_its_name() -> None:
    logged = Logged()
    fit(build(GeneralizedHeadDistillation), [logged], epochs=1)
    assert all(step.keys() == {"loss", "returned", "head/layer2", "head/layer3"} for step in logged.steps)


def test_it_may_stand_as_an_extra_term_beside_another() -> None:
    loss = GeneralizedHeadDistillationLoss({"layer3": 2.0})
    extra = {"far": Term(loss, [["student/layer3"], ["teacher/layer3"]], weight=0.5)}
    terms, found = terms_of(double(build(HeadDistillation, extra_terms=extra)), IMAGES, LABELS)
    theirs = taught(IMAGES)
    assert terms == {
        "head": pytest.approx(squared_error(found["layer2"], theirs["layer2"]), rel=1e-9),
        "far/layer3": pytest.approx(squared_error(found["layer3"], theirs["layer3"]), rel=1e-9),
    }
