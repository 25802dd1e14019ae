"""All attackers and controls on one victim."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cleave.architectures.attacking.decoders import inversion_decoder
from cleave.architectures.macs import count_params
from cleave.lightning_modules.attacking.releases import NetworkReleases
from cleave.lightning_modules.attacking.training import Schooled, rebuilt, school
from cleave.lightning_modules.attacking.white_box import white_box
from cleave.reports.attacks.metrics import Features, intervals, per_image
from cleave.reports.attacks.results import ATTACKER, CONTROL, Attack, marked
from cleave.reports.terminal import say
from cleave.scripts.assembly.attacking.images import AttackImages
from cleave.scripts.assembly.attacking.settings import LOGITS, RAW, UNAWARE
from cleave.scripts.assembly.attacking.victim import Victim

Sent = Callable[[Tensor], Tensor]
_FEW = 64  # validation images on which the white-box attack chooses its weight


class Study:
    """Runs attackers and controls, and keeps what they rebuilt of a few targets.

    Args:
        settings: As :func:`~cleave.scripts.assembly.attacking.settings.checked` returns them.
        victim: What is attacked.
        images: The adversary's images and the targets.
        features: Maps images from 0 to 1 to the features by which they are compared.

    Attributes:
        attacks: What was found so far.
        pictures: Some targets by what rebuilt them, the originals first.
        draws: Whether two releases of one image differ.
    """

    def __init__(self, settings: dict[str, Any], victim: Victim, images: AttackImages, features: Features) -> None:
        device = torch.device(settings["device"])
        self.settings, self.victim, self.features = settings, victim, features
        self.train, self.val, self.targets = (each.to(device) for each in images[:3])
        self.true = {key: getattr(self, key).float() / 255 for key in ("train", "val", "targets")}
        self.mean = self.true["train"].mean(0)
        self.mean_mse = per_image(self.mean.expand_as(self.true["targets"]), self.true["targets"])["mse"]
        count = min(settings["pictures"], len(self.targets))
        self.shown = torch.linspace(0, len(self.targets) - 1, count).round().long().to(device)
        self.pictures = {"original": self.true["targets"][self.shown].cpu()}
        self.draws = victim.releases.draws(self.train)
        self.attacks: list[Attack] = []

    def run(self) -> list[Attack]:
        """Run all that the settings ask for, the attackers first, and return what was found."""
        attack, controls = self.settings["attack"], self.settings["controls"]
        releases, strong = self.victim.releases, attack["strengths"][-1:]
        for times in attack["releases"] if self.draws else [1]:
            wanted = attack["strengths"] if times == 1 else strong
            self._decoders("payload", ATTACKER, functools.partial(releases, times=times), self.draws, wanted, times)
        if self.victim.network is not None and self.settings["white_box"]["use"] is not False:
            self._white_box(self.victim.network)
        self._add("mean image", CONTROL, self.mean.expand_as(self.true["targets"]))
        if UNAWARE in controls and self.draws and self.victim.unaware is not None:
            unaware = self.victim.unaware
            self._decoders("payload, trained without the noise", CONTROL, unaware, False, strong, met=releases)
        if LOGITS in controls:
            self._decoders("logits", CONTROL, releases.answers, self.draws, strong)
        if RAW in controls:
            self._decoders("raw input", CONTROL, lambda images: images.float() / 255, False, strong)
        self.attacks = marked(self.attacks)
        return self.attacks

    def _decoders(
        self,
        name: str,
        role: str,
        sent: Sent,
        draws: bool,
        strengths: Sequence[str],
        times: int = 1,
        met: Sent | None = None,
    ) -> None:
        """Train decoders of all families on what is sent, and have them rebuild the targets from what they meet."""
        first = sent(self.train)
        families = [(family, strength) for family in self.settings["attack"]["families"] for strength in strengths]
        torch.manual_seed(self.settings["seed"])
        decoders = [inversion_decoder(*each, first, self.mean).to(self.mean.device) for each in families]
        say(f"{name}{f', mean of {times} releases' if times > 1 else ''}: {len(decoders)} decoders learn …")
        redrawn = (lambda: sent(self.train)) if draws else (lambda: first)
        how = self.settings["schooling"]
        found = school(decoders, redrawn, self.true["train"], sent(self.val), self.true["val"], how)
        payloads = (met or sent)(self.targets)
        for (family, strength), schooled in zip(families, found, strict=True):
            self._add(name, role, rebuilt(schooled.decoder, payloads), schooled, family, strength, times)

    def _white_box(self, network: NetworkReleases) -> None:
        """Search for the images, with the weight of the total variation that is best on the adversary's own."""
        own = self.settings["white_box"]
        say("white box: searching for the images …")
        payloads = network(self.train)
        scale = payloads.std(0).square().mean().sqrt().clamp_min(1e-6)
        how = {"start": self.mean, "steps": own["steps"], "lr": own["lr"], "scale": scale}

        def search(images: Tensor, tv: float) -> Tensor:
            return torch.cat([white_box(network, some, tv=tv, **how) for some in network(images).split(256)])

        errors = {}
        few, true = self.val[:_FEW], self.true["val"][:_FEW]
        for tv in own["tv"] if len(own["tv"]) > 1 else ():
            errors[tv] = (search(few, tv) - true).square().mean().item()
        best = min(errors, key=errors.__getitem__) if errors else own["tv"][0]
        self._add(f"white box, total variation {best:g}", ATTACKER, search(self.targets, best))

    def _add(
        self,
        name: str,
        role: str,
        images: Tensor,
        schooled: Schooled | None = None,
        family: str | None = None,
        strength: str | None = None,
        times: int = 1,
    ) -> None:
        """Note what an attack came to."""
        figures = per_image(images, self.true["targets"], self.features)
        seed, resamples = self.settings["seed"], self.settings["resamples"]
        attack = Attack(
            name,
            role,
            intervals(figures, self.mean_mse, resamples, seed),
            family,
            strength,
            times,
            epoch=None if schooled is None else schooled.epoch,
            val_mse=None if schooled is None else schooled.val_mse,
            parameters=None if schooled is None else count_params(schooled.decoder),
        )
        self.attacks.append(attack)
        self.pictures[attack.title] = images[self.shown].cpu()
