"""What Weights & Biases keeps of a run: checkpoint, bundle, sample predictions, and how the run ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning import loggers as pl_loggers
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor


class WandbLogger(pl_loggers.WandbLogger):
    """Lightning's ``WandbLogger``, with a clear word where W&B cannot start the run and none about settings it dropped.

    Args:
        resume: Whether the run with the given ``id`` goes on; or one of the words of ``wandb.init``.
        **kwargs: Arguments of Lightning's logger and of ``wandb.init``.
    """

    def __init__(self, resume: bool | str = True, **kwargs: Any) -> None:
        super().__init__(**kwargs, resume=("allow" if resume else None) if isinstance(resume, bool) else resume)
        # Lightning 2.6 always passes `anonymous`, and W&B warns of it at every start.
        self._wandb_init.pop("anonymous", None)

    @property
    def experiment(self) -> Any:
        """The W&B run, started when first asked for; on other ranks than zero a stand-in that does nothing.

        Raises:
            ConnectionError: W&B refuses the login or cannot be reached.
        """
        import wandb

        if self._experiment is None and getattr(self, "_attach_id", None):
            # A spawned process attaches to its parent's run with its own settings: media would go to its own folder.
            wandb.setup(wandb.Settings(root_dir=self.save_dir))
        try:
            return super().experiment
        except wandb.Error as error:
            raise ConnectionError(
                f"W&B could not start the run: {error} (log in by `wandb login`, or set logger.wandb.mode=offline to "
                "sync later, or logger.wandb.mode=disabled)"
            ) from error


class WandbTracking(Callback):
    """Logs the best checkpoint as an artifact and a table of test predictions, online and offline alike.

    Without a ``WandbLogger`` among the trainer's loggers, or with W&B disabled, it does nothing.

    Args:
        predictions: Rows of the prediction table, images at even distances through the test set; 0 for none.
        step: Name of the recipe's step, an alias of its checkpoint: ``checkpoint-ID:head``.

    Raises:
        ValueError: ``predictions`` is negative.
    """

    def __init__(self, predictions: int = 32, step: str | None = None) -> None:
        if predictions < 0:
            raise ValueError(f"predictions must be 0 or a number of rows, got {predictions}")
        self.predictions = predictions
        self.aliases = ("latest", "best") if step is None else ("latest", "best", step)

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the best checkpoint, with its score."""
        checkpoint: Any = trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "")
        if path and (run := wandb_run(trainer)):
            score = checkpoint.best_model_score
            metadata = {"monitor": checkpoint.monitor, "score": None if score is None else float(score)}
            log_artifact(run, Path(path), kind="model", name="checkpoint", aliases=self.aliases, metadata=metadata)

    @rank_zero_only
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a table of images, labels, predictions and confidences."""
        if self.predictions == 0 or getattr(trainer, "datamodule", None) is None:
            return
        if (run := wandb_run(trainer)) and (table := prediction_table(trainer, pl_module, self.predictions)):
            run.log({"test/predictions": table})


def prediction_table(trainer: pl.Trainer, task: pl.LightningModule, count: int) -> Any:
    """Predict images spread through the test set and return them as a ``wandb.Table``.

    Args:
        trainer: A trainer that is testing the task on a data module of ours.
        task: The task.
        count: Rows wanted; fewer where the test set is smaller.

    Returns:
        The table; ``None`` where the network's answer is no logits of classes.
    """
    import wandb

    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batch = data.sample_batch("test", count)
    normalized = data.input.normalize(batch["images"].to(task.device))
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        answer = task(trainer.precision_plugin.convert_input(normalized))
    names: Sequence[str] = data.class_names
    if not isinstance(answer, Tensor) or answer.shape[1:] != (len(names),) or "labels" not in batch:
        return None
    confidence, predicted = answer.float().softmax(1).max(1)
    table = wandb.Table(columns=["image", "label", "prediction", "confidence", "correct"])
    rows = zip(batch["images"], batch["labels"].tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    for image, label, guess, sure in rows:
        table.add_data(wandb.Image(_pixels(image)), names[label], names[guess], sure, label == guess)
    return table


def _pixels(image: Tensor) -> Any:
    """A uint8 image (C, H, W) as W&B takes it: (H, W, C), or (H, W) where it is grey."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return pixels.squeeze(2) if pixels.shape[2] == 1 else pixels


def wandb_run(trainer: pl.Trainer) -> Any | None:
    """Return the W&B run of the trainer's ``WandbLogger``.

    ``None`` where there is no such logger, where W&B is disabled, and on every rank but zero, which has no run.
    """
    if not trainer.is_global_zero:
        return None
    for logger in trainer.loggers:
        if isinstance(logger, pl_loggers.WandbLogger):
            run = logger.experiment
            return None if run.disabled else run
    return None


def wandb_id(trainer: pl.Trainer) -> str | None:
    """Return the id of the trainer's W&B run, ``None`` where there is none."""
    run = wandb_run(trainer)
    return None if run is None else str(run.id)


def log_artifact(
    run: Any,
    path: Path,
    *,
    kind: str,
    name: str,
    aliases: Sequence[str] = ("latest",),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Log a file or a folder as the artifact ``NAME-<run id>``; W&B uploads it when it is online.

    Args:
        run: The W&B run.
        path: The file or folder.
        kind: The artifact's type, such as ``model``.
        name: The artifact's name without the run's id.
        aliases: Names by which W&B finds this version.
        metadata: Plain values shown beside the artifact.
    """
    import wandb

    artifact = wandb.Artifact(f"{name}-{run.id}", type=kind, metadata=dict(metadata or {}))
    if path.is_dir():
        artifact.add_dir(str(path))
    else:
        artifact.add_file(str(path))
    run.log_artifact(artifact, aliases=list(aliases))


def log_report(
    logger: Any, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]], files: Mapping[str, Path]
) -> None:
    """Give W&B a report's table, its pictures and its files, for which other loggers have no place, and end the log.

    Args:
        logger: Any logger.
        name: The table's.
        header: Names of its columns.
        rows: Their values.
        files: What was written, by the names of the artifacts; pictures are PNG files.
    """
    if isinstance(logger, pl_loggers.WandbLogger) and not logger.experiment.disabled:
        logger.log_table(name, list(header), [list(row) for row in rows])
        for artifact, file in files.items():
            if file.suffix == ".png":
                logger.log_image(file.stem, [str(file)])
            else:
                log_artifact(logger.experiment, file, kind="report", name=artifact)
    logger.finalize("success")


_recording = ContextVar("recording", default=False)


@contextmanager
def recorded_outcome() -> Iterator[None]:
    """Finish the W&B run started within: exit code 0, that of a ``SystemExit``, or 1 on any other exception.

    W&B itself records an exception that the script turns into an exit status as a success, and whatever is tracked next
    in the same process, such as the next job of a sweep, would write into a run left open. A run that was open before
    is its owner's to finish; inside another of these the run is the outer one's.
    """
    if _recording.get():
        yield
        return
    before, token = _open_run(), _recording.set(True)
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        _finish(code, before)
        raise
    else:
        _finish(0, before)
    finally:
        _recording.reset(token)


def _open_run() -> Any | None:
    wandb = sys.modules.get("wandb")  # not imported: nothing was tracked
    return None if wandb is None else wandb.run


def _finish(exit_code: int, before: Any | None) -> None:
    run = _open_run()
    if run is not None and run is not before:
        run.finish(exit_code=exit_code)
