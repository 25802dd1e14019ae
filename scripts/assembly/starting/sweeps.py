"""A sweep: its jobs go on when one fails, and in the end a table says what each came to."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cleave.scripts.assembly.starting import outlets

RECORD, TRACE = "job.json", "error.txt"
_CHOOSES_NOTHING = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class FailedJob(Exception):  # noqa: N818 what a job is, and no mistake of the sweep's
    """A job that failed; it holds words alone, as it may come from another process."""


class Sweep(Callback):
    """Writes down what each job of a sweep came to, in the process that ran it."""

    folder: ClassVar[Path | None] = None
    """Where the jobs of this process's sweep lie."""
    metric: ClassVar[str] = "metric"

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note where the jobs will lie, and forget those of an earlier sweep there."""
        Sweep.folder = Path(config.hydra.sweep.dir).absolute()
        Sweep.metric = config.get("optimized_metric") or "metric"
        for record in Sweep.folder.rglob(RECORD):
            record.unlink()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record a job.

        Hydra's own sweeper, which chooses nothing, would stop behind a batch with a failed job; to it none has failed.
        """
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        value = job_return._return_value
        failed = job_return.status == JobStatus.FAILED
        record = {
            "number": config.hydra.job.num,
            "overrides": list(job_return.overrides or []),
            "metric": float(value) if isinstance(value, int | float) else None,
            "error": str(value) if failed else None,
        }
        Path(config.hydra.runtime.output_dir, RECORD).write_text(json.dumps(record))
        if failed and OmegaConf.select(config, "hydra.sweeper._target_") == _CHOOSES_NOTHING:
            job_return.return_value, job_return.status = None, JobStatus.COMPLETED


def sweeping() -> bool:
    """Return whether this is one of the jobs of a Hydra multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def chooses() -> bool:
    """Return whether this is a job of a sweep that chooses by what its jobs return."""
    return sweeping() and OmegaConf.select(HydraConfig.get(), "sweeper._target_") != _CHOOSES_NOTHING


def run_job(task: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Run a job of a sweep.

    Raises:
        FailedJob: It failed; its folder holds the trace.
    """
    try:
        return task(cfg)
    except Exception as error:
        from cleave.scripts.assembly.starting.terminal import unwrapped

        if isinstance(error, OSError):  # who reads none of what this job prints reads none of the next one's
            outlets.leave_if_failed(after=error)
        mistake = unwrapped(error)
        failure = FailedJob(f"{type(mistake).__name__}: {mistake}")
        file = Path(HydraConfig.get().runtime.output_dir, TRACE)
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    # Behind the except clause nothing holds the job's frames, and with them its memory, which the next one needs.
    gc.collect()
    outlets.complain(f"Job {HydraConfig.get().job.num} failed: {failure}\nIts trace: {file}")
    raise failure


def told() -> bool:
    """Print the table of the sweep that this process ran, if it did; return whether a job of it failed."""
    if Sweep.folder is None:
        return False
    from cleave.reports.terminal import console, number, table

    jobs = [json.loads(file.read_text()) for file in Sweep.folder.rglob(RECORD)]
    jobs.sort(key=lambda job: job["number"])
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    rows = []
    for job in jobs:
        value = "not measured" if job["metric"] is None else number(job["metric"])
        value = value if job["error"] is None else f"failed: {_first_line(job['error'])}"
        rows.append((job["number"], " ".join(each for each in job["overrides"] if each not in shared), value))
    table(f"Sweep in {Sweep.folder}", rows, ("job", "overrides", Sweep.metric))
    failed = sum(job["error"] is not None for job in jobs)
    if failed:
        console.print(f"{failed} of {len(jobs)} jobs failed; {TRACE} in the folder of each says where", highlight=False)
    return failed > 0


def _first_line(text: str, width: int = 70) -> str:
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= width else f"{line[: width - 1]}…"
