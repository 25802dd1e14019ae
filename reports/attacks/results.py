"""What attacks came to, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cleave.reports.attacks.metrics import Interval

ATTACKER, CONTROL = "attacker", "control"


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack, or one control.

    Attributes:
        name: What it works on, in words: ``payload``, ``white box``, ``raw input``, ``mean image`` …
        role: ``attacker`` or ``control``.
        family: The decoder's family; ``None`` where none is trained.
        strength: Its strength.
        releases: Releases of one image that are averaged.
        figures: Means over the targets by name, ``mse`` and ``explained`` among them.
        epoch: The best epoch; 0: it never beat the mean image.
        val_mse: Error on the adversary's validation images.
        parameters: Of the decoder.
        chosen: Whether these images would choose it.
    """

    name: str
    role: str
    figures: dict[str, Interval]
    family: str | None = None
    strength: str | None = None
    releases: int = 1
    epoch: int | None = None
    val_mse: float | None = None
    parameters: int | None = None
    chosen: bool = False

    @property
    def title(self) -> str:
        """Everything that tells it from the others."""
        words = [self.name, *(each for each in (self.family, self.strength) if each is not None)]
        return ", ".join(words) + (f", mean of {self.releases} releases" if self.releases > 1 else "")

    @property
    def mse(self) -> float:
        """Its mean squared error."""
        return self.figures["mse"].value


def marked(attacks: Sequence[Attack]) -> list[Attack]:
    """Mark, for each number of releases, the trained attacker that the adversary's validation images choose."""
    trained = [each for each in attacks if each.role == ATTACKER and each.val_mse is not None]
    best: dict[int, Attack] = {}
    for each in trained:
        before = best.get(each.releases)
        if before is None or (each.val_mse or 0.0) < (before.val_mse or 0.0):
            best[each.releases] = each
    return [dataclasses.replace(each, chosen=best.get(each.releases) is each) for each in attacks]


def strongest(attacks: Sequence[Attack], releases: int = 1) -> Attack:
    """Return the attacker of the lowest error, of those who have so many releases."""
    return min((each for each in attacks if each.role == ATTACKER and each.releases == releases), key=lambda e: e.mse)


def headlines(attacks: Sequence[Attack]) -> list[dict[str, Any]]:
    """Return the lowest error over attackers and what it explains, for each number of releases."""
    found = []
    for releases in sorted({each.releases for each in attacks if each.role == ATTACKER}):
        best = strongest(attacks, releases)
        figures = {name: dataclasses.asdict(best.figures[name]) for name in ("mse", "explained")}
        found.append({"releases": releases, "attack": best.title, **figures})
    return found


def as_values(attack: Attack) -> dict[str, Any]:
    """Return an attack as JSON can hold it."""
    return {**dataclasses.asdict(attack), "title": attack.title}
