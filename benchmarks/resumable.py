"""What long benchmarks share: scripts run once, resumed where they were interrupted, and rows of Markdown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, folder: Path, threads: int, *overrides: str, done: str) -> None:
    """Run a script unless its result is there, from its last checkpoint where it was interrupted.

    Args:
        script: Name of a script of Cleave's.
        folder: Its output folder.
        threads: For torch.
        *overrides: Of its config.
        done: File in the folder that says so: the script's result, or else an empty mark.
    """
    if (folder / done).exists():
        return
    saved = sorted(folder.glob("checkpoints/**/last.ckpt"), key=lambda path: path.stat().st_mtime)
    resume = [f"ckpt_path={saved[-1]}"] if saved and script == "train" else []
    print(f"{script} {folder.name}{' (resumed)' if resume else ''} …", flush=True)
    command = [sys.executable, str(ROOT / f"scripts/{script}.py"), *overrides, *resume, f"hydra.run.dir={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        sys.exit(f"{script} failed with exit status {status}; see {folder / 'output.txt'}")
    (folder / done).touch()


def percent(share: float | None) -> str:
    """Format a share of 1; what was not measured is a dash."""
    return "–" if share is None else f"{100 * share:.2f} %"


def line(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
