"""The tables of a report, as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cleave.reports.rates.fronts import Setting, trade_offs
from cleave.reports.terminal import number, say, short, table


def print_tables(known: Sequence[Setting], reference: float | None) -> None:
    """Print every setting, then the trade-off of each backbone with its Pareto front marked.

    Args:
        known: The settings.
        reference: Accuracy of the unsplit network.
    """
    header: tuple[str, ...] = ("method", "setting", "bytes", "after zstd", "accuracy", "seeds", "epochs", "seconds")
    rows: list[tuple[Any, ...]] = [
        (
            s.method,
            s.label,
            number(s.payload_bytes),
            _known(s.payload_zstd_bytes),
            percent(s),
            s.seeds,
            _known(s.epochs),
            _known(s.train_seconds),
        )
        for s in known
    ]
    if reference is not None:
        rows.append(("unsplit network", "", "", "", f"{100 * reference:.2f} %", "", "", ""))
    table("Accuracy over payload bytes", rows, header)
    header = ("method", "setting", "parameters", "MACs", "bytes", "accuracy", "front")
    for backbone, group in trade_offs(known).items():
        rows = [
            (
                s.method,
                s.label,
                f"{s.encoder_params:,}",
                "–" if s.encoder_macs is None else short(s.encoder_macs),
                number(s.payload_bytes),
                percent(s),
                "●" if front else "",
            )
            for s, front in group
        ]
        name = backbone or "an unknown backbone"
        table(f"Parameters on the device, bytes and accuracy of {name}: the Pareto front is marked", rows, header)
    if missing := sum(s.encoder_params is None for s in known):
        say(f"Without encoder_params, {missing} of {len(known)} settings have no place in the trade-off.")


def percent(setting: Setting) -> str:
    """Return a setting's accuracy, with its standard deviation where there are several seeds."""
    spread = "" if setting.accuracy_std is None else f" ± {100 * setting.accuracy_std:.2f}"
    return f"{100 * setting.accuracy:.2f}{spread} %"


def _known(value: float | None) -> str:
    return "–" if value is None else number(value)
