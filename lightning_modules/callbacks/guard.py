"""A guard that stops a fit which has diverged, before the weights take it in."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor

from cleave.architectures.inserts.finite import NumberError, few, learned_names, not_finite
from cleave.lightning_modules.command_line import quoted
from cleave.lightning_modules.resuming import resume_command

RECORD = "not_finite"


class Guard(Callback):
    """Stops a fit whose training loss, validation answers or weights are no longer finite.

    A loss is looked at before its gradients exist, so that no step is taken by it, and weights before they are saved,
    so that every checkpoint holds finite ones. What was wrong is written to ``not_finite.json``, with the images of the
    batch. Under a gradient scaler infinite gradients are usual and stop nothing. Reading a loss makes the host wait for
    the device once a batch.

    Args:
        dirpath: Folder of the file.

    Raises:
        NumberError: In a fit; it names what is not finite, where, the last good checkpoint and how to go on from it.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)
        self.batch = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch."""
        self.batch = batch_idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Stop at a loss that is not finite; each term is looked at where their sum is not."""
        # Not the loss that is given, which a gradient scaler has multiplied.
        losses: Mapping[str, Tensor] = getattr(pl_module, "losses", None) or {"loss": loss.detach()}
        if torch.stack(list(losses.values())).sum().isfinite():
            return
        values = {name: float(value) for name, value in losses.items()}
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        what = f"the training loss {', '.join(broken or ['is infinite in sum'])}"
        what += f" in epoch {trainer.current_epoch}, step {trainer.global_step}, batch {self.batch}"
        raise NumberError(f"{what}; {self._record(trainer, values)}. {_way_out(trainer)}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop where the network's answers were not finite in validation."""
        broken: list[str] = [] if trainer.sanity_checking else getattr(pl_module, "broken_outputs", list)()
        if broken:
            what = f"{', '.join(broken)} of the network held NaN or infinity in the validation after epoch"
            raise NumberError(f"{what} {trainer.current_epoch}. {_way_out(trainer)}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop before weights or running statistics are saved that are not finite."""
        if broken := not_finite(checkpoint["state_dict"], learned_names(pl_module)):
            what = f"{few(broken)} held NaN or infinity, and no checkpoint"
            what += f" was saved, in epoch {trainer.current_epoch}, step {trainer.global_step}"
            raise NumberError(f"{what}. {_way_out(trainer)}")

    def _record(self, trainer: pl.Trainer, losses: Mapping[str, float]) -> str:
        """Write down the batch, and return where."""
        data: Any = getattr(trainer, "datamodule", None)
        record = {
            # As words where JSON has no number for them.
            "losses": {name: value if math.isfinite(value) else str(value) for name, value in losses.items()},
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "batch": self.batch,
            "rank": trainer.global_rank,
            "indices": data.training_indices(self.batch) if hasattr(data, "training_indices") else None,
        }
        rank = f"_rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = self.dirpath / f"{RECORD}{rank}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return f"the indices of its images are in {file}"


def last_good(trainer: pl.Trainer) -> str | None:
    """Return the newest checkpoint of a fit, that it was resumed from at the least; ``None`` where there is none."""
    found: list[Any] = [trainer.ckpt_path]
    for callback in trainer.checkpoint_callbacks:
        found += [getattr(callback, name, None) for name in ("last_model_path", "best_model_path")]
    files = [Path(path) for path in found if path and Path(path).is_file()]
    return str(max(files, key=lambda file: file.stat().st_mtime_ns)) if files else None


def _way_out(trainer: pl.Trainer) -> str:
    """Say how to go on."""
    cure = "trainer.gradient_clip_val=1"
    path = last_good(trainer)
    if path is None:
        return (
            "No checkpoint was saved before: start again with a lower training.optimizer.lr, or with "
            f"{cure} (callbacks.guard=null goes on regardless)"
        )
    installed = Path(sys.argv[0]).stem == "cleave-train"
    given = sys.argv[1:] if installed or Path(sys.argv[0]).name == "train.py" else []
    words = [word for word in given if not word.startswith("trainer.gradient_clip_val=")]
    command = resume_command(["cleave-train"] if installed else ["python", "scripts/train.py"], [*words, cure], path)
    return (
        f"The last good checkpoint is {path}. As the same run would diverge again, resume it with clipped gradients: "
        f"{command}; or start from it with a lower rate: {quoted({'base.ckpt_path': path})} training.optimizer.lr=… "
        "(callbacks.guard=null goes on regardless)"
    )
