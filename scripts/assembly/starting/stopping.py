"""What a command says where SIGTERM or Ctrl-C ends it: what is kept, and how to go on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch.multiprocessing import ProcessExitedException

from cleave.lightning_modules import privates, signals
from cleave.lightning_modules.resuming import resume_command
from cleave.lightning_modules.signals import Stopped
from cleave.scripts.assembly.starting.program import started
from cleave.scripts.assembly.starting.project import project_options

REQUEUED = "hpc_ckpt_*.ckpt"
_OF_A_SWEEP = ("hydra.mode", "hydra.sweep", "hydra.sweeper", "hydra.launcher")


@contextmanager
def telling_what_is_kept(cfg: DictConfig) -> Iterator[None]:
    """Say what is kept of a run of ``train.py`` that a signal ends within, and the command that goes on with it."""
    try:
        yield
    except BaseException as error:
        stopped = stopped_by(error)
        if stopped is None:
            raise
        file = stopped.checkpoint or _saved_last(cfg)
        if file is None:
            stopped.add_note("Nothing of it was saved.")
        else:
            stopped.add_note(f"What was trained is kept in {file}")
            stopped.add_note(f"Go on: {going_on(file)}")
        raise stopped from error


@contextmanager
def telling_where_it_goes_on(folder: str, kept: str, script: str, key: str) -> Iterator[None]:
    """Say that a signal leaves what was measured in a folder, and the command that goes on there.

    Args:
        folder: The folder.
        kept: What it keeps, such as ``Points that were measured``.
        script: The command's name.
        key: The setting that names the folder.
    """
    try:
        yield
    except BaseException as error:
        if (stopped := stopped_by(error)) is None:
            raise
        stopped.add_note(f"{kept} are kept in {folder}")
        stopped.add_note(f"Go on: {going_on(folder, script, key)}")
        raise stopped from error


def stopped_by(error: BaseException) -> Stopped | None:
    """Return the signal behind an exception; what breaks once a signal was received, such as a worker, is its doing."""
    if isinstance(error, Stopped):
        return error
    signum = signals.received()
    if isinstance(error, ProcessExitedException) and error.exit_code - 128 in signals.SIGNALS:
        signum = error.exit_code - 128  # the signal reached a spawned process alone
    return None if signum is None else Stopped(signum, speaks=signals.speaks())


@contextmanager
def forwarding(trainer: pl.Trainer) -> Iterator[None]:
    """Pass signals on to the processes that a trainer spawns; they save, and end this one by ending."""
    kill = privates.kill_of_spawned(trainer)
    if kill is None or not signals.installed():
        yield
        return
    with signals.deferring(lambda signum: kill(signals.SIGNALS[0]), at_once=lambda: kill(9)):
        yield


def requeued(cfg: DictConfig) -> str | None:
    """Return the checkpoint from which a job goes on that SLURM started again, the latest that it saved.

    Lightning would look for its own in every step of a recipe, and load it for a test as well.
    """
    if not SLURMEnvironment.detect():
        return None
    folder = Path(cfg.paths.output_dir)
    if any(folder.rglob(REQUEUED)):
        files = [*folder.rglob(REQUEUED), *folder.rglob("last.ckpt")]
        return str(max(files, key=lambda path: path.stat().st_mtime_ns))
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0 and signals.speaks():
        print(
            f"SLURM started this job again, but {folder} holds nothing to go on from; give the job a folder of its own "
            "that stays the same, hydra.run.dir=FOLDER",
            file=sys.stderr,
        )
    return None


def used_up(trainer: pl.Trainer) -> None:
    """Remove what a job saved to be started again, once its fit has come to its end."""
    if trainer.is_global_zero:
        for file in Path(trainer.default_root_dir).glob(REQUEUED):
            file.unlink()


def going_on(file: str, name: str = "train", key: str = "ckpt_path") -> str:
    """Return the command of this run, going on from a file or a folder.

    Args:
        file: What it goes on from.
        name: The script's name.
        key: The setting that takes it.
    """
    if not HydraConfig.initialized():
        return resume_command(started(name), [], file, key)
    given = HydraConfig.get().overrides
    own = [each for each in given.hydra if not each.startswith(_OF_A_SWEEP)]
    return resume_command(started(name), [*project_options(), *given.task, *own], file, key)


def _saved_last(cfg: DictConfig) -> str | None:
    """Return the latest ``last.ckpt`` of a run, or else what it was itself resumed from."""
    found = sorted(Path(cfg.paths.checkpoints).rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return str(found[-1]) if found else cfg.ckpt_path
