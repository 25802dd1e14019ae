from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cleave.lightning_modules import Reconstruction, Term
from cleave.losses import KnowledgeDistillationLoss, ReconstructionLoss

from .split_tasks import Logged, batch, build, double, fit, log_softmax, taught, teacher, terms_of

KD = ["student/logits", "teacher/logits", "labels"]
IMAGES, LABELS = batch(torch.float64)


def equation_5(found: dict[str, Any], power: float, norm: float, epsilon: float) -> float:
    difference = (taught(IMAGES)["layer2"] - found["layer2"]).flatten(1).numpy() + epsilon
    return float(((np.abs(difference) ** norm).sum(1) ** (power / norm)).mean())


@pytest.mark.parametrize("codec", [{"bits": 4}, {"bits": 4, "range": "learned"}, {"bits": 32}])
@pytest.mark.parametrize(
    ("power", "norm", "epsilon"),
    [pytest.param(1, 2, 1e-6, id="choi"), pytest.param(1, 1, 0, id="jankowski"), (2, 2, 0), (1.5, 3, 1e-2)],
)
def test_the_loss_is_the_surveys_equation_5(power: float, norm: float, epsilon: float, codec: dict[str, Any]) -> None:
    loss = ReconstructionLoss(power=power, norm=norm, epsilon=epsilon)
    task = double(build(Reconstruction, {"form": "insert", "codec": codec}, loss=loss))
    terms, found = terms_of(task, IMAGES, LABELS)
    # The target is the feature of the whole backbone in eval mode.
    assert terms == {"reconstruction": pytest.approx(equation_5(found, power, norm, epsilon), rel=1e-8)}


def test_distillation_may_be_added() -> None:
    extra = {"kd": Term(KnowledgeDistillationLoss(alpha=0, temperature=2.0), KD, weight=0.5)}
    terms, found = terms_of(double(build(Reconstruction, others=teacher(), extra_terms=extra)), IMAGES, LABELS)
    log_q, log_p = (log_softmax(logits / 2) for logits in (found["logits"], taught(IMAGES)["logits"]))
    assert terms == {
        "reconstruction": pytest.approx(equation_5(found, 1, 2, 1e-6), rel=1e-8),
        "kd": pytest.approx(0.5 * 4 * (np.exp(log_p) * (log_p - log_q)).sum(1).mean(), rel=1e-8),
    }


def test_the_feature_is_learned_without_a_teacher() -> None:
    task, logged = build(Reconstruction), Logged()
    fit(task, [logged], epochs=8, limit_val_batches=0)
    losses = logged.losses()
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_no_gradient_reaches_the_target() -> None:
    task = build(Reconstruction, train=["head", "bottleneck"])
    task.set_modes()
    images, _ = batch()
    head = task.network.outputs(images, ["layer2/input"])["layer2/input"].detach().requires_grad_()
    found = task.network.outputs(None, ["layer2"], given={"layer2/input": head})["layer2"]
    loss = task.terms["reconstruction"].loss(found, head)
    (through_encoder,) = torch.autograd.grad(loss, head, retain_graph=True)
    again = task.terms["reconstruction"].loss(found, head.detach())
    (expected,) = torch.autograd.grad(again, head)
    assert torch.equal(through_encoder, expected)
    assert expected.abs().sum() > 0
