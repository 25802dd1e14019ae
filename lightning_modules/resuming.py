"""A module whose schedules and latest metrics go on in a resumed run as they would have without the interruption."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from cleave.lightning_modules import privates
from cleave.lightning_modules.command_line import quoted

KEY = "resuming"


class ResumingModule(pl.LightningModule):
    """Steps schedulers that watch a metric, such as ``ReduceLROnPlateau``, once for each step or epoch.

    Lightning steps them behind its checkpoints and leaves the step out of what it resumes. So a checkpoint says how far
    each of them came and what was measured last; a resumed run first takes the step that is missing. Gradients that
    were being accumulated are in the checkpoint, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stepped: dict[str, int] = {}
        self._measured: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def on_train_start(self) -> None:
        """Bring back what was measured and accumulated last, and take the step that the checkpoint lacks."""
        if self.trainer.fit_loop.is_resuming:
            privates.restore_metrics(self.trainer, self._measured)
            for name, gradient in self._gradients.items():
                weight = self.get_parameter(name)
                weight.grad = gradient.to(weight)
            self._catch_up()
        else:
            self._stepped = {}
        self._measured, self._gradients = {}, {}

    def on_train_epoch_end(self) -> None:
        """Take the step at the end of a resumed epoch, which Lightning leaves out."""
        if self.trainer.fit_loop.restarting:
            self._catch_up()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler; one that watches a metric not a second time at the same place of the run."""
        if metric is None:
            scheduler.step()
            return
        for name, config in self._watching():
            if config.scheduler is scheduler and _place(self.trainer, config) > self._stepped.get(name, 0):
                scheduler.step(metric)
                self._stepped[name] = _place(self.trainer, config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record how far the schedulers came that watch a metric, what was measured last, and what waits for a step."""
        if self._trainer is None:
            return
        # Learning rates are logged under names that hang on when their monitor began; no scheduler watches them.
        metrics = {name: value for name, value in self.trainer.callback_metrics.items() if not name.startswith("lr-")}
        measured = {name: value.detach().cpu().clone() for name, value in metrics.items()}
        checkpoint[KEY] = {"stepped": dict(self._stepped), "measured": measured, "gradients": self._pending()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what was recorded."""
        recorded = checkpoint.get(KEY, {"stepped": {}, "measured": {}, "gradients": {}})
        self._stepped, self._measured = dict(recorded["stepped"]), dict(recorded["measured"])
        self._gradients = dict(recorded["gradients"])

    def _pending(self) -> dict[str, Tensor]:
        """Return gradients that wait for an optimizer step; those of several processes differ, and are left out."""
        if self.trainer.world_size > 1 or not privates.accumulating(self.trainer):
            return {}
        found = ((name, weight.grad) for name, weight in self.named_parameters())
        return {name: gradient.detach().cpu().clone() for name, gradient in found if gradient is not None}

    def _catch_up(self) -> None:
        for _, config in self._watching():
            metric = self.trainer.callback_metrics.get(config.monitor)
            if metric is not None:
                self.lr_scheduler_step(config.scheduler, metric)

    def _watching(self) -> Iterator[tuple[str, Any]]:
        """Yield the schedulers that watch a metric, by their place among all."""
        for number, config in enumerate(self.trainer.lr_scheduler_configs):
            if config.reduce_on_plateau:
                yield str(number), config


def _place(trainer: pl.Trainer, config: Any) -> int:
    """Return how many steps or epochs are behind a run."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return trainer.global_step if config.interval == "step" else progress.processed


def resume_command(start: Sequence[str], overrides: Iterable[str], file: str, key: str = "ckpt_path") -> str:
    """Return the command of a run, going on from a checkpoint, quoted for the shell and for Hydra.

    Args:
        start: What starts it: Python and a script, or an installed command.
        overrides: What it was given.
        file: The checkpoint.
        key: The setting that takes it.
    """
    kept = [each for each in overrides if not each.lstrip("+").startswith(f"{key}=")]
    return f"{shlex.join([*start, *kept])} {quoted({key: file})}"
