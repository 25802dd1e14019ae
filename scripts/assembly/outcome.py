"""What a run of train.py came to: tables, results, the bundle, and the command to type next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from omegaconf import DictConfig

from cleave.architectures import StagedNetwork
from cleave.architectures.naming import did_you_mean
from cleave.architectures.network.outputs import LOGITS
from cleave.lightning_modules import Measured
from cleave.lightning_modules.callbacks.tracking import log_artifact, wandb_run
from cleave.reports.answers import say_if_larger
from cleave.reports.rates.measured import Run, measured_points
from cleave.reports.rates.results import RESULTS, write_results
from cleave.reports.terminal import cost_rows, in_words, number, results_table, say, table
from cleave.scripts.assembly.building import Assembly, plain
from cleave.scripts.assembly.bundling import chosen_exits, example_input, write_bundle
from cleave.scripts.assembly.fitting import Fitted
from cleave.scripts.assembly.hints import command, next_command, vouching
from cleave.scripts.assembly.linking.report import path_record, path_table, path_words
from cleave.scripts.assembly.restoring import Restored, restore
from cleave.scripts.assembly.starting.sweeps import chooses


class Outcome(NamedTuple):
    """What was measured in the end.

    Attributes:
        metrics: Everything that was logged, by name.
        measured: What the test came to, by meaning; ``None`` where there was none.
    """

    metrics: Mapping[str, Any]
    measured: Measured | None


def finish(
    cfg: DictConfig, parts: Assembly, fitted: list[Fitted], outcome: Outcome, perfect: Outcome, trainer: pl.Trainer
) -> None:
    """Print what was measured, where it lies and what to do next; write the bundle if asked.

    Args:
        cfg: The resolved config of the last step.
        parts: What the run was made of.
        fitted: Every step of the run.
        outcome: What was measured in the end.
        perfect: The same over a perfect link, for the bundle.
        trainer: The last step's.
    """
    best = fitted[-1].best
    step_table(fitted)
    shown = {name: value for name, value in outcome.metrics.items() if name.startswith(("val/", "test/"))}
    file = best or (None if cfg.train else cfg.ckpt_path)
    results_table(f"Results of {Path(file).name if file else 'the last weights'}", shown)
    say_if_larger(shown)
    table("Cost per image", cost_rows(parts.network.costs()), ("part", "MACs", "parameters"))
    say_promises(parts.network)
    path = path_record(parts.network, outcome.metrics)
    path_table(path)
    if best:
        say(f"Checkpoint: {best}")
    elif (last := Path(cfg.paths.checkpoints, "last.ckpt")).is_file() and fitted[-1].epochs is not None:
        say(f"Checkpoint: {last}, as trained last: {fitted[-1].monitor} was never measured, so none is the best")
    run = described(
        cfg,
        " → ".join(each.method for each in fitted),
        checkpoint=best or cfg.ckpt_path,
        epochs=total(each.epochs for each in fitted),
        seconds=total(each.seconds for each in fitted),
    )
    if (epsilon := outcome.metrics.get("train/epsilon")) is not None:
        run = dataclasses.replace(run, words=(*run.words, f"DP-SGD of ε = {float(epsilon):.3g}"))
    if found := measured_points(run, outcome.measured, parts.network):
        file = Path(cfg.paths.output_dir) / RESULTS
        write_results(file, found, found[0].kind, path)
        say(f"Results: {file} ({command('compare', {'inputs': [file]})} puts runs side by side)")
    if cfg.export:
        # Of the file, as under `ddp_spawn` only the ranks' own networks went back to the best weights.
        network = restore(best, trusted=True).network if best else parts.network
        bundle = Path(cfg.paths.output_dir) / "bundle"
        write_bundle(
            network,
            parts.data,
            bundle,
            config=plain(cfg),
            metrics=perfect.metrics,
            measured=perfect.measured,
            points=measured_points(run, perfect.measured, parts.network),
            exits=chosen_exits(network, parts.data, cfg),
            overwrite=True,
        )
        if tracked := wandb_run(trainer):
            log_artifact(tracked, bundle, kind="bundle", name="bundle")
        next_command("infer", {"bundle": bundle, "input": example_input(parts.data)})
    elif best:
        next_command("exits_report" if parts.network.exits else "export", {"ckpt_path": best} | vouching(plain(cfg)))


def say_promises(network: StagedNetwork) -> None:
    """Say what the noise over each representation promises against whoever reads it."""
    for cut, bottleneck in network.bottlenecks.items():
        promise = None if bottleneck.noise is None else bottleneck.noise.promise(network.shapes[LOGITS][0])
        if promise is not None:
            say(f"Privacy at {cut}, against any other input: {promise}")


def returned(cfg: DictConfig, metrics: Mapping[str, float]) -> float | None:
    """Return the metric that a sweep asks for; where it was not measured, say so: the run itself went well.

    Raises:
        ValueError: It was not measured, and this is a job of a sweep that chooses by it.
    """
    name = cfg.optimized_metric
    if not name or not cfg.train or name in metrics:
        return metrics.get(name)
    split = f"{name.partition('/')[0]}/"
    measured = sorted(metric for metric in metrics if "/acc_class/" not in metric)
    why = f"optimized_metric={name} was not measured"
    if not any(metric.startswith(split) for metric in measured):
        why += ", as no validation ended" if split == "val/" else ""
    message = why + (f"; measured were {', '.join(measured)}.{did_you_mean(name, measured)}" if measured else "")
    if chooses():
        raise ValueError(message)
    say(message)
    return None


def described(
    cfg: DictConfig,
    method: str,
    *,
    checkpoint: str | None,
    epochs: int | None = None,
    seconds: float | None = None,
) -> Run:
    """Return what a point of a report says of the run that it is of."""
    words = [f"{cfg.bottleneck.channels} channels" if cfg.split.form != "none" else "no bottleneck"]
    if "channels" not in cfg.bottleneck:
        words = []
    words = [*path_words(cfg)] or words
    beta = cfg.get("beta") or cfg.method.get("beta")
    return Run(
        method=method,
        words=tuple(words),
        beta=beta,
        epochs=epochs,
        seconds=seconds,
        seed=cfg.seed,
        backbone=cfg.backbone.get("name"),
        checkpoint=checkpoint,
    )


def run_of(restored: Restored, checkpoint: str, *variants: str | None) -> Run:
    """Return what a point of a report says of the run that a checkpoint is of, and of what was changed since."""
    config = restored.config
    method = " → ".join(config.steps.values()) if config.get("steps") else in_words(config.method._target_)
    return described(config, ", ".join([method, *filter(None, variants)]), checkpoint=checkpoint)


def step_table(fitted: list[Fitted]) -> None:
    """Print what each step of a recipe came to."""
    if any(each.name is None or each.epochs is None for each in fitted):
        return
    rows = [
        (
            f"{each.name}: {each.method.lower()}",
            each.epochs,
            "" if each.score is None else number(each.score),
            timedelta(seconds=round(each.seconds or 0)),
        )
        for each in fitted
    ]
    table("Steps", rows, ("step", "epochs", f"best {fitted[-1].monitor}", "h:mm:ss"))


def total(values: Iterable[Any]) -> Any:
    """Return the sum of figures, ``None`` where one of them is unknown."""
    known = list(values)
    return None if None in known else sum(known)
