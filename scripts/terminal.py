"""What a person sees: one-line errors, and tables of results."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

# A pipe has no width of its own, and rich's guess of 80 columns would cut figures off.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
CONF = str(Path(__file__).resolve().parent.parent / "conf")
FULL_ERRORS = os.environ.get("HYDRA_FULL_ERROR") == "1"
USER_ERRORS = (ValueError, TypeError, OSError, HydraException, OmegaConfBaseException, MisconfigurationException)


def friendly(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Turn a user's mistake into one line and exit status 1; ``HYDRA_FULL_ERROR=1`` shows where it arose.

    A config value that is still missing is named before anything is built.
    """

    @wraps(task)
    def run(cfg: DictConfig) -> Any:
        quiet()
        try:
            if missing := missing_values(cfg):
                raise ValueError(
                    f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value; "
                    f"add {' '.join(f'{key}=…' for key in missing)}"
                )
            return task(cfg)
        except USER_ERRORS as error:
            if FULL_ERRORS:
                raise
            fail(error)

    return run


def missing_values(cfg: DictConfig) -> list[str]:
    """Keys of a config that still have no value, in order; values that lean on them are left out."""

    def search(node: Any, at: str) -> list[str]:
        if isinstance(node, dict):
            return [key for name, value in node.items() for key in search(value, f"{at}.{name}" if at else str(name))]
        return [at] if node == "???" else []

    return sorted(search(OmegaConf.to_container(cfg), ""))


def start(main: Callable[[], Any]) -> None:
    """Run a script; what Hydra itself refuses (a misspelt key, a folder it cannot write) is one line as well."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a trace
    try:
        main()
    except USER_ERRORS as error:
        if FULL_ERRORS:
            raise
        fail(error)


def quiet() -> None:
    """Keep what frameworks say to themselves off the terminal; their warnings and errors stay."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 asks torch 2.15 about trees in a form torch is about to drop; no user can mend that.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).* is deprecated", FutureWarning)
    # A run shorter than the interval still logs at the end of each epoch.
    warnings.filterwarnings("ignore", r"The number of training batches .* is smaller than the logging interval")


def unwrapped(error: BaseException) -> BaseException:
    """Return what a call of Hydra's raised in place of Hydra's own words around it."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return error


def fail(error: BaseException) -> None:
    """Print an error, unwrapped from Hydra's instantiation, and leave with exit status 1."""
    error = unwrapped(error)
    if isinstance(error, HydraException) and error.__cause__ is not None:
        error = type(error)(f"{error}\n{error.__cause__}")
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    raise SystemExit(1)


def table(title: str, rows: Iterable[tuple[Any, ...]], header: tuple[str, ...] = ()) -> None:
    """Print rows under a title; columns after the first stand right. Without rows there is nothing to print."""
    rows = [tuple(str(cell) for cell in row) for row in rows]
    if not rows:
        return
    console.print(f"\n[bold]{title}[/bold]", soft_wrap=True, highlight=False)
    grid = Table(show_header=bool(header))
    for i in range(max(map(len, rows))):
        grid.add_column(header[i] if header else "", justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def results_table(title: str, metrics: Mapping[str, Any]) -> None:
    """Print measured metrics; per-class accuracies are summed up by the worst three."""
    per_class = {k.rpartition("/")[2]: float(v) for k, v in metrics.items() if "/acc_class/" in k}
    rows = [(name, number(float(value))) for name, value in metrics.items() if "/acc_class/" not in name]
    for name, value in sorted(per_class.items(), key=lambda item: item[1])[:3]:
        rows.append((f"accuracy of class {name}", number(value)))
    table(title, rows)


def profile_rows(profile: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str, str]]:
    """Rows (part, MACs, parameters) of a network's profile."""
    return [(part, f"{cost['macs']:,}", f"{cost['params']:,}") for part, cost in profile.items()]


def number(value: float) -> str:
    """Format a number: whole ones in full, others with four significant digits."""
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"


def short(count: float) -> str:
    """Format a large count with three digits and a unit: 14.6 M."""
    for unit in ("", " k", " M", " G"):
        if count < 1000 or unit == " G":
            break
        count /= 1000
    return f"{count:.3g}{unit}"


def next_command(command: str) -> None:
    """Print the command to type next, unwrapped so that it can be copied."""
    console.print(f"Next: [bold]{command}[/bold]", soft_wrap=True, highlight=False)
