from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cleave.lightning_modules import InformationBottleneck
from cleave.losses import InformationBottleneckLoss

from .split_tasks import (
    VARIANCE,
    Logged,
    batch,
    bottleneck_of,
    build,
    codes,
    cross_entropy,
    double,
    fit,
    terms_of,
    through_bytes,
)

IMAGES, LABELS = batch(torch.float64)
CONSTANT = {"bottleneck": {"channels": 3, "width": 8, "variance": 0.01}}


def from_standard_normal(mean: np.ndarray, log_variance: np.ndarray) -> np.ndarray:
    return 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)


def from_log_uniform(mean: np.ndarray, log_variance: np.ndarray) -> np.ndarray:
    log_alpha = log_variance - np.log(mean**2)
    sigmoid = 1 / (1 + np.exp(-(1.87320 + 1.48695 * log_alpha)))
    return 0.63576 * (1 - sigmoid) + 0.5 * np.log1p(np.exp(-log_alpha))


DIVERGENCES = {"standard_normal": from_standard_normal, "log_uniform": from_log_uniform}


@pytest.mark.parametrize("form", ["replace", "insert"])
@pytest.mark.parametrize("spread", [VARIANCE, CONSTANT], ids=["learned", "constant"])
@pytest.mark.parametrize("prior", DIVERGENCES)
def test_the_loss_is_alemis_equation_17(prior: str, spread: dict[str, Any], form: str) -> None:
    rate = InformationBottleneckLoss(prior=prior)
    task = double(build(InformationBottleneck, spread | {"form": form}, rate=rate, beta=0.05))
    terms, found = terms_of(task, IMAGES, LABELS)
    assert not torch.equal(found["z"], found["mean"])
    divergence = DIVERGENCES[prior](found["mean"].numpy(), found["log_variance"].numpy()).sum() / len(IMAGES)
    assert terms == {
        "cross_entropy": pytest.approx(cross_entropy(found["logits"], LABELS), rel=1e-6),
        "rate": pytest.approx(0.05 * divergence, rel=1e-6),
    }


def test_in_evaluation_the_mean_is_sent() -> None:
    task = build(InformationBottleneck)
    fit(task, epochs=1)
    network = task.network.eval()
    images, _ = batch()
    bottleneck = bottleneck_of(network)
    first, second = (bottleneck.codec.encode(codes(network, images)) for _ in range(2))
    assert first == second
    mean = bottleneck.encoder.mean(bottleneck.encoder.body(images))
    received = bottleneck.codec.decode(first)
    step = (received["high"] - received["low"])[0] / 15
    inside = mean.clamp(received["low"][0], received["high"][0])
    decoded = bottleneck.quantizer.receive(*received.values())
    assert (decoded - inside).abs().max() <= 0.5 * step + 1e-6
    first, second = (through_bytes(network, images)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_heavier_rate_carries_less() -> None:
    divergences = []
    for beta in (1e-6, 1.0):
        task, logged = build(InformationBottleneck, beta=beta), Logged()
        fit(task, [logged], epochs=6, limit_val_batches=0)
        divergences.append(logged.steps[-1]["rate"] / beta)
    assert divergences[1] < 0.5 * divergences[0]
