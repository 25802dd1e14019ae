"""What is known of the information between the targets and their payloads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from cleave.architectures.attacking.critic import Critic
from cleave.lightning_modules.attacking.critics import batches, bounds, ceiling, train_critic
from cleave.losses import distance_correlation
from cleave.losses.privacy.distance_correlation import LEAST
from cleave.reports.attacks.information import ABOVE, BELOW, Bound, Information, bound_of, payload_bits
from cleave.reports.terminal import say
from cleave.scripts.assembly.attacking.images import AttackImages
from cleave.scripts.assembly.attacking.victim import Victim


def information_of(settings: dict[str, Any], victim: Victim, images: AttackImages, draws: bool) -> Information:
    """Measure bounds and the distance correlation on the targets, which neither network nor critic has seen.

    Args:
        settings: As :func:`~cleave.scripts.assembly.attacking.settings.checked` returns them.
        victim: What is attacked.
        images: The adversary's images and the targets.
        draws: Whether two releases of one image differ.
    """
    own, device = settings["information"], torch.device(settings["device"])
    targets = images.targets.to(device)
    payloads = victim.releases(targets)
    found = _correlation(targets, payloads, own["batch"], settings["seed"])
    if not own["use"]:
        return Information((), found)
    bootstrap = {"resamples": settings["resamples"], "seed": settings["seed"]}
    above = _above(victim, targets, bootstrap)
    below = _below(settings, victim, images, payloads, draws, bootstrap)
    return Information((*above, *below), found)


def _above(victim: Victim, targets: Tensor, bootstrap: dict[str, int]) -> list[Bound]:
    bits = payload_bits(victim.releases.payload_bytes(targets))
    found = [bound_of("payload_bits", "payload, envelope apart", ABOVE, bits, **bootstrap)]
    network = victim.network
    if network is None:
        return found
    if (rate := network.rate(targets)) is not None:
        found.append(bound_of("rate_bits", "mean rate under the learned prior", ABOVE, rate, **bootstrap))
    if (divergence := network.divergence(targets)) is not None:
        name = "mean KL from a standard normal"
        drawn = None if network.bottleneck.sampled else "of z as training draws it; the device sends its mean"
        found.append(bound_of("kl_bits", name, ABOVE, divergence / math.log(2), holds_of=drawn, **bootstrap))
    return found


def _below(
    settings: dict[str, Any],
    victim: Victim,
    images: AttackImages,
    payloads: Tensor,
    draws: bool,
    bootstrap: dict[str, int],
) -> list[Bound]:
    """Return InfoNCE's bound by a critic that learned on the adversary's images; none of fewer than two of any."""
    own, device = settings["information"], payloads.device
    train, val, targets = (each.to(device) for each in images[:3])
    if min(len(train), len(val), len(targets)) < 2:
        return []
    seed, batch = settings["seed"], own["batch"]
    true, first = train.float() / 255, victim.releases(train)
    torch.manual_seed(seed)
    critic = Critic(true, first).to(device)
    say("bounds on information: a critic learns …")
    how = dataclasses.replace(settings["schooling"], epochs=own["epochs"], batch_size=batch)
    redrawn = (lambda: victim.releases(train)) if draws else (lambda: first)
    critic, _ = train_critic(critic, redrawn, true, victim.releases(val), val.float() / 255, how)
    values = torch.stack(bounds(critic, targets.float() / 255, payloads, batch, seed))
    most = ceiling(len(targets), batch)
    return [
        bound_of("infonce_bits", "InfoNCE, by a critic on held-out images", BELOW, values, ceiling=most, **bootstrap)
    ]


def _correlation(targets: Tensor, payloads: Tensor, batch: int, seed: int) -> dict[str, Any] | None:
    """Return the bias-corrected distance correlation with its spread over batches."""
    if len(targets) < LEAST[True]:
        return None
    values = torch.stack(
        [
            distance_correlation(targets[some].float(), payloads[some], bias_corrected=True)
            for some in batches(len(targets), batch, seed)
        ]
    ).double()
    spread = values.std().item() if len(values) > 1 else 0.0
    size = min(batch, len(targets))
    return {"value": values.mean().item(), "spread": spread, "batches": len(values), "batch": size}
