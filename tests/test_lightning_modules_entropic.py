from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cleave.deployment import ENVELOPE_BYTES
from cleave.lightning_modules import CrossEntropy, Entropic, Term
from cleave.losses import GeneralizedHeadDistillationLoss, RateLoss

from .split_tasks import (
    ENTROPY,
    Logged,
    backbone,
    batch,
    bottleneck_of,
    build,
    codes,
    double,
    evaluate,
    fit,
    squared_error,
    taught,
    teacher,
    terms_of,
    whole,
)

IMAGES, LABELS = batch(torch.float64)
PIXELS = 8 * 8


def cumulative(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Balle's cumulative (2018, appendix 6.1) of each channel at x (B, C, H, W), from the parameters."""
    prior = bottleneck_of(network).quantizer
    logits = x.movedim(1, 0).reshape(3, 1, -1)
    for k, (matrix, bias) in enumerate(zip(prior.matrices, prior.biases, strict=True)):
        logits = torch.log1p(torch.exp(matrix)) @ logits + bias
        if k < len(prior.factors):
            logits = logits + torch.tanh(prior.factors[k]) * torch.tanh(logits)
    return (1 / (1 + torch.exp(-logits))).reshape(3, *x.movedim(1, 0).shape[1:]).movedim(0, 1)


@pytest.mark.parametrize("form", ["replace", "insert"])
def test_the_loss_is_distillation_and_the_rate_in_bits_per_pixel(form: str) -> None:
    other = backbone(seed=1)
    loss = GeneralizedHeadDistillationLoss({"layer2": 0.7, "layer3": 1.3})
    task = build(Entropic, ENTROPY | {"form": form}, loss=loss, beta=0.3, others=teacher(other))
    terms, found = terms_of(double(task), IMAGES, LABELS)
    noise = (found["z_hat"] - found["z"]).abs()
    assert 0.4 < noise.max() <= 0.5
    theirs = taught(IMAGES, other)
    with torch.no_grad():
        mass = cumulative(task.network, found["z_hat"] + 0.5) - cumulative(task.network, found["z_hat"] - 0.5)
    bits = -np.log2(mass.numpy()).sum() / (len(IMAGES) * PIXELS)
    assert terms == {
        "head/layer2": pytest.approx(0.7 * squared_error(found["layer2"], theirs["layer2"]), rel=1e-9),
        "head/layer3": pytest.approx(1.3 * squared_error(found["layer3"], theirs["layer3"]), rel=1e-9),
        "rate": pytest.approx(0.3 * bits, rel=1e-6),
    }


def test_a_heavier_rate_shortens_the_payloads() -> None:
    lengths = []
    for beta in (0.0, 1e5):
        task, logged = build(Entropic, beta=beta), Logged()
        fit(task, [logged], epochs=12, limit_val_batches=0)
        lengths.append(evaluate(task)["test/payload_bytes"])
    assert logged.steps[-1]["rate"] < 0.7 * logged.steps[0]["rate"]
    assert lengths[1] < 0.8 * lengths[0]


def test_the_payloads_are_as_long_as_the_prior_estimates() -> None:
    task = build(Entropic, beta=1e3)
    fit(task, epochs=12, limit_val_batches=0)
    network = task.network.eval()
    sent = codes(network, whole()[0])
    payloads = bottleneck_of(network).codec.encode(sent)
    estimated = bottleneck_of(network).quantizer.estimated_bits(sent["codes"].float())
    for payload, bits in zip(payloads, estimated.tolist(), strict=True):
        assert bits / 8 - 1 <= len(payload) <= bits / 8 + 8  # a coder's words and header; a share of so short a stream
    measured = evaluate(task)
    assert measured["test/payload_bytes"] == pytest.approx(
        ENVELOPE_BYTES + np.mean([len(payload) for payload in payloads])
    )
    assert measured["test/estimated_bytes"] == pytest.approx(estimated.mean().item() / 8, rel=1e-6)


def test_the_rate_may_be_added_to_any_method() -> None:
    task = double(
        build(
            CrossEntropy,
            ENTROPY,
            extra_terms={"rate": Term(RateLoss(PIXELS), ["student/layer2/likelihoods"], weight=2.0)},
        )
    )
    terms, found = terms_of(task, IMAGES, LABELS)
    bits = bottleneck_of(task.network).quantizer.estimated_bits(found["z_hat"]).mean().item()
    assert terms["rate"] == pytest.approx(2 * bits / PIXELS, rel=1e-6)
    assert terms.keys() == {"cross_entropy", "rate"}
