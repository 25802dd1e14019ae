"""What a run of train.py came to: tables, results, the bundle, and the command to type next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from cleave.architectures import MultiExitNetwork, profile
from cleave.lightning_modules.callbacks.tracking import log_artifact, wandb_run
from cleave.reports.rates.measured import measured_points
from cleave.reports.rates.results import RESULTS, write_results
from cleave.reports.terminal import console, next_command, number, profile_rows, results_table, table
from cleave.scripts.assembly.building import Assembly, plain
from cleave.scripts.assembly.bundling import example_input, write_bundle
from cleave.scripts.assembly.exit_bundling import chosen_exits
from cleave.scripts.assembly.fitting import Fitted
from cleave.scripts.assembly.restoring import restore


def finish(
    cfg: DictConfig,
    parts: Assembly,
    done: list[Fitted],
    metrics: Mapping[str, Any],
    shipped: Mapping[str, Any],
    trainer: pl.Trainer,
) -> None:
    """Print what was measured, where it lies and what to do next; write the bundle if asked.

    Args:
        cfg: The resolved config of the last stage.
        parts: What the run was made of.
        done: Every stage of the run.
        metrics: What was measured in the end.
        shipped: The same over a perfect link, for the bundle.
        trainer: The last stage's.
    """
    best = done[-1].best
    stage_table(done)
    results_table("Results", {k: v for k, v in metrics.items() if k.startswith(("val/", "test/"))})
    cost = profile(parts.network, parts.data.input.shape)
    table("Cost per image", profile_rows(cost), ("part", "MACs", "parameters"))
    if best:
        console.print(f"Checkpoint: {best}", soft_wrap=True, highlight=False)
    found = measured_points(
        cfg,
        " → ".join(fitted.method for fitted in done),
        metrics,
        cost,
        epochs=total(fitted.epochs for fitted in done),
        seconds=total(fitted.seconds for fitted in done),
        checkpoint=best or cfg.ckpt_path,
        image_bytes=math.prod(parts.data.input.shape),
    )
    if found:
        file = Path(cfg.paths.output_dir) / RESULTS
        write_results(file, found, found[0].kind)
        console.print(
            f"Results: {file} (python scripts/compare.py 'inputs=[…]' puts runs side by side)", soft_wrap=True
        )
    if cfg.export:
        # Of the file, as under `ddp_spawn` only the ranks' own networks went back to the best weights.
        network = restore(best, trusted=True).network if best else parts.network
        bundle = Path(cfg.paths.output_dir) / "bundle"
        exits = chosen_exits(network, parts.data.input, cfg)
        write_bundle(network, parts.data, bundle, config=plain(cfg), metrics=shipped, exits=exits, overwrite=True)
        if run := wandb_run(trainer):
            log_artifact(run, bundle, kind="bundle", name="bundle")
        next_command(f"python scripts/infer.py bundle={bundle} input={example_input(parts.data)}")
    elif best:
        script = "exits_report" if isinstance(parts.network, MultiExitNetwork) else "export"
        next_command(f"python scripts/{script}.py ckpt_path={best}")


def stage_table(done: list[Fitted]) -> None:
    """Print what each stage of a recipe came to."""
    if any(fitted.name is None or fitted.epochs is None for fitted in done):
        return
    rows = [
        (
            f"{fitted.name}: {fitted.method.lower()}",
            fitted.epochs,
            "" if fitted.score is None else number(fitted.score),
            timedelta(seconds=round(fitted.seconds or 0)),
        )
        for fitted in done
    ]
    table("Stages", rows, ("stage", "epochs", f"best {done[-1].monitor}", "h:mm:ss"))


def total(values: Iterable[Any]) -> Any:
    """Return the sum of figures, ``None`` where one of them is unknown."""
    known = list(values)
    return None if None in known else sum(known)
