"""The tables of an attack, for a person and as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cleave.reports.attacks.metrics import Interval
from cleave.reports.attacks.results import Attack, strongest
from cleave.reports.terminal import say, table

_HEADER = ("attack", "MSE", "explained", "PSNR (dB)", "SSIM", "features", "epoch")
_DIGITS = {"mse": 4, "psnr": 1}
_COLUMNS = ("mse", "explained", "psnr", "ssim", "features")


def print_attacks(title: str, attacks: Sequence[Attack]) -> None:
    """Print all attackers and controls, and the headline."""
    table(f"{title}: mean and 95 % interval over images", [_cells(each) for each in attacks], _HEADER)
    say("* chosen on the adversary's own validation images. Explained: 1 is a full leak, 0 the mean image.")
    for releases in sorted({each.releases for each in attacks}):
        best = strongest(attacks, releases)
        mse, explained = best.figures["mse"], best.figures["explained"]
        of = "one release" if releases == 1 else f"the mean of {releases} releases"
        say(
            f"Lowest MSE behind {of}: {mse.value:.4g} [{mse.low:.4g}, {mse.high:.4g}] by {best.title}; explained "
            f"{explained.value:.3f} [{explained.low:.3f}, {explained.high:.3f}]"
        )


def csv_rows(attacks: Sequence[Attack]) -> list[dict[str, Any]]:
    """Return a row for each attack, intervals beside the means."""
    rows = []
    for each in attacks:
        row: dict[str, Any] = {"attack": each.title, "name": each.name, "role": each.role, "family": each.family}
        row |= {"strength": each.strength, "releases": each.releases, "epoch": each.epoch, "val_mse": each.val_mse}
        row |= {"parameters": each.parameters, "chosen": each.chosen}
        for name in _COLUMNS:
            found = each.figures.get(name)
            row |= {name: found and found.value}
            row |= {f"{name}_{end}": found and getattr(found, end) for end in ("low", "high")}
        rows.append(row)
    return rows


def _cells(attack: Attack) -> tuple[str, ...]:
    title = f"{attack.title} *" if attack.chosen else attack.title
    epoch = "" if attack.epoch is None else str(attack.epoch)
    return title, *(_cell(attack.figures.get(name), name) for name in _COLUMNS), epoch


def _cell(found: Interval | None, name: str) -> str:
    if found is None:
        return ""
    value = f"{found.value:.{_DIGITS.get(name, 3)}f}"
    if name not in ("mse", "explained"):
        return value
    return f"{value} [{found.low:.{_DIGITS.get(name, 3)}f}, {found.high:.{_DIGITS.get(name, 3)}f}]"
