"""Train: data → network → task → callbacks → loggers → trainer → fit → test → bundle."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("train")

from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, open_dict

from cleave.architectures import Cost
from cleave.lightning_modules import signals
from cleave.lightning_modules.callbacks.metadata import KEY
from cleave.lightning_modules.callbacks.tracking import recorded_outcome
from cleave.lightning_modules.checkpoints.loading import check_kind, load_strictly, network_state, read_checkpoint
from cleave.scripts.assembly.building import Assembly, assemble, instantiate_each, plain
from cleave.scripts.assembly.bundling import chosen_exits
from cleave.scripts.assembly.fitting import Fit, Fitted, fit, only_tested, prepare
from cleave.scripts.assembly.given.resumed import compare, explained
from cleave.scripts.assembly.idle import say_what_is_idle
from cleave.scripts.assembly.outcome import Outcome, finish, returned
from cleave.scripts.assembly.recipe import all_steps, steps_to_go
from cleave.scripts.assembly.restoring import validated
from cleave.scripts.assembly.starting.stopping import forwarding, requeued, telling_what_is_kept
from cleave.scripts.assembly.starting.sweeps import sweeping
from cleave.scripts.assembly.starting.terminal import quiet


@recorded_outcome()
def train(cfg: DictConfig) -> dict[str, Any]:
    """Run what the config describes and return the metrics measured."""
    refuse_subprocess_sweep(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    if cfg.train and cfg.ckpt_path is None:
        cfg.ckpt_path = requeued(cfg)
    checkpoint = read_checkpoint(cfg.ckpt_path) if cfg.ckpt_path else None
    with explained(cfg, checkpoint if cfg.train else None):
        parts, fits, loggers = planned_run(cfg, checkpoint)
    fitted = [Fitted(**before) for before in checkpoint[KEY].get("before", [])] if checkpoint else []
    # As the checkpoint holds it, unless that is of one step alone.
    log_setup(loggers, plain(fits[0].step.config if cfg.steps is None else cfg), parts, fits)
    for planned in fits:
        fitted.append(fit(planned, parts, fitted) if cfg.train else only_tested(planned))
    outcome = perfect = tested(cfg, fits[-1], parts, fitted[-1].best, validation=True)
    if cfg.test and cfg.export and any(each.channel is not None for each in parts.network.bottlenecks.values()):
        # A bundle is measured through its bytes, which its runtime delivers whole; the loggers keep the link's numbers.
        parts.network.set_channel(None)
        fits[-1].trainer.loggers = []
        perfect = tested(cfg, fits[-1], parts, fitted[-1].best, validation=False)
        fits[-1].trainer.loggers = loggers
    if fits[-1].trainer.is_global_zero:
        finish(fits[-1].step.config, parts, fitted, outcome, perfect, fits[-1].trainer)
    return {name: float(value) for name, value in outcome.metrics.items()}


def planned_run(cfg: DictConfig, checkpoint: dict[str, Any] | None) -> tuple[Assembly, list[Fit], list[Any]]:
    """Build all that a run is made of, its network with the checkpoint's weights: its parts, fits and loggers.

    What cannot be built or resumed from is named before any training time is spent, of the last step too.
    """
    steps = all_steps(cfg)
    to_go = steps_to_go(cfg, steps, checkpoint)
    parts = assemble(to_go[0].config, [step.config.method for step in steps])
    tracked = checkpoint[KEY].get("wandb_id") if checkpoint else None
    track_on(cfg, tracked)
    loggers = instantiate_each(cfg.get("logger"))
    fits = [prepare(step, parts, loggers) for step in to_go]
    for planned in fits:
        planned.metadata.wandb_id = tracked
    if not any("teacher" in planned.task.asked for planned in fits) and cfg.teacher.ckpt_path is not None:
        raise ValueError(
            f"teacher.ckpt_path={cfg.teacher.ckpt_path} would be ignored: nothing learns from a teacher; set a method "
            "that distils, such as method=exits_distilled method.loss.source=teacher, or leave it out"
        )
    say_what_is_idle(to_go[-1].config)
    if cfg.export:
        chosen_exits(parts.network, parts.data, to_go[-1].config)
    if checkpoint:
        check_kind(checkpoint, parts.network, cfg.ckpt_path)
        load_strictly(parts.network, network_state(checkpoint), f"the checkpoint {cfg.ckpt_path}")
        if cfg.train:
            compare(cfg, plain(fits[0].step.config), checkpoint)
    return parts, fits, loggers


def track_on(cfg: DictConfig, run: str | None) -> None:
    """Let a resumed run go on in its W&B run, unless the config names another or says not to.

    What is only tested, and each job of a sweep, is a run of its own.
    """
    logger = (cfg.get("logger") or {}).get("wandb")
    if run is None or logger is None or not cfg.train or not logger.get("resume", True) or sweeping():
        return
    if logger.get("id") is None:
        with open_dict(logger):
            logger.id = run


def tested(cfg: DictConfig, planned: Fit, parts: Assembly, best: str | None, *, validation: bool) -> Outcome:
    """Test the best weights, if the config says so, and return what was measured by now.

    With ``validation`` what was validated stands beside it: of the best weights, not of the last epoch's.
    """
    metrics = dict(planned.trainer.callback_metrics)
    if best and validation:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("val/")} | validated(best)
    if not cfg.test:
        return Outcome(metrics, None)
    file = best or (None if cfg.train else cfg.ckpt_path)
    with forwarding(planned.trainer):
        planned.trainer.test(planned.task, datamodule=parts.data, ckpt_path=file, weights_only=True, verbose=False)
    return Outcome(metrics | planned.trainer.callback_metrics, planned.task.measured(planned.trainer.callback_metrics))


def log_setup(loggers: list[Any], resolved: dict[str, Any], parts: Assembly, fits: list[Fit]) -> None:
    """Give every logger the resolved config, what each part of the network costs, and what each step trains."""
    trainable: dict[str | None, int] = {}
    for planned in fits:
        planned.task.freeze_parts()
        trainable[planned.step.name] = sum(p.numel() for p in parts.network.parameters() if p.requires_grad)
    fits[0].task.freeze_parts()  # the last one has left its own parts frozen
    cost: dict[str, Any] = {key(each): {"macs": each.macs, "params": each.params} for each in parts.network.costs()}
    cost["trainable_params"] = trainable.get(None, trainable)
    for logger in loggers:
        logger.log_hyperparams({**resolved, "cost": cost})


def key(cost: Cost) -> str:
    """Name a part of the network among what loggers keep."""
    return f"{cost.kind}/{cost.name}"


def refuse_subprocess_sweep(cfg: DictConfig) -> None:
    """A sweep under subprocess ``ddp`` would give each rank other hyper-parameters without a word.

    Raises:
        ValueError: A Hydra multirun asks for a strategy that launches subprocesses.
    """
    if sweeping() and launches_processes(cfg):
        strategy = cfg.trainer.get("strategy") or "auto"
        raise ValueError(
            f"a multirun with trainer.strategy={strategy} on several devices would launch ranks with other "
            "hyper-parameters than the job's; use trainer.devices=1, trainer.strategy=ddp_spawn, or single runs"
        )


def launches_processes(cfg: DictConfig) -> bool:
    """Return whether the trainer would start this command again for its other devices."""
    strategy = str(cfg.trainer.get("strategy") or "auto")
    in_process = ("spawn", "fork", "notebook")
    many = str(cfg.trainer.get("devices")) != "1" or int(cfg.trainer.get("num_nodes") or 1) > 1
    return many and not any(word in strategy for word in in_process)


def main(cfg: DictConfig) -> float | None:
    """Train and return the optimised metric to the sweeper."""
    with telling_what_is_kept(cfg), recorded_outcome():
        return returned(cfg, train(cfg))


if __name__ == "__mp_main__":  # a rank of ddp_spawn
    quiet()
    signals.install()
