"""What attribute inference came to, as plain values and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from cleave.reports.attacks.metrics import Interval
from cleave.reports.attacks.results import ATTACKER
from cleave.reports.terminal import say, table

_HEADER = ("attack", "accuracy", "95 % interval", "epoch")


class Inference(NamedTuple):
    """One attack, or one control.

    Attributes:
        name: What it works on: ``payload``, ``raw input``, ``logits``, or ``majority``, which takes nothing.
        role: ``attacker`` or ``control``.
        accuracy: Share of the targets whose attribute it tells.
        family: The classifier's family; ``None`` where none is trained.
        releases: Releases of one image that are averaged.
        epoch: The best epoch; 0: it never beat the shares of the attributes.
        val_loss: Cross entropy on the adversary's validation images.
        parameters: Of the classifier.
    """

    name: str
    role: str
    accuracy: Interval
    family: str | None = None
    releases: int = 1
    epoch: int | None = None
    val_loss: float | None = None
    parameters: int | None = None

    @property
    def title(self) -> str:
        """Everything that tells it from the others."""
        words = self.name if self.family is None else f"{self.name}, {self.family}"
        return words + (f", mean of {self.releases} releases" if self.releases > 1 else "")


def best(found: Sequence[Inference], name: str | None = None) -> Inference:
    """Return the attacker of the highest accuracy, or the best of those of some name."""
    some = [each for each in found if (each.role == ATTACKER if name is None else each.name == name)]
    return max(some, key=lambda each: each.accuracy.value)


def print_inferences(title: str, found: Sequence[Inference]) -> None:
    """Print all attackers and controls, and the headline."""
    table(title, [_cells(each) for each in found], _HEADER)
    top, majority = best(found), best(found, "majority")
    say(
        f"Highest accuracy: {100 * top.accuracy.value:.1f} % [{100 * top.accuracy.low:.1f}, "
        f"{100 * top.accuracy.high:.1f}] by {top.title}; the commonest attribute alone is right in "
        f"{100 * majority.accuracy.value:.1f} %"
    )


def as_values(found: Inference) -> dict[str, Any]:
    """Return an attack as JSON can hold it."""
    return {**found._asdict(), "accuracy": dataclasses.asdict(found.accuracy), "title": found.title}


def csv_rows(found: Sequence[Inference]) -> list[dict[str, Any]]:
    """Return a row for each attack, the interval beside the accuracy."""
    rows = []
    for each in found:
        row = {"attack": each.title, **each._asdict()}
        low, high = each.accuracy.low, each.accuracy.high
        rows.append(row | {"accuracy": each.accuracy.value, "accuracy_low": low, "accuracy_high": high})
    return rows


def _cells(each: Inference) -> tuple[str, ...]:
    epoch = "" if each.epoch is None else str(each.epoch)
    found = each.accuracy
    return each.title, f"{100 * found.value:.1f} %", f"{100 * found.low:.1f} to {100 * found.high:.1f} %", epoch
