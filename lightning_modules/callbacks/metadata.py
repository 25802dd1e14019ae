"""What a checkpoint must carry so that a network can be rebuilt from it alone."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback

from cleave.deployment import ImageInput
from cleave.lightning_modules.callbacks.tracking import wandb_id

KEY = "cleave"
SCHEMA = 2
"""Raised where a network of before can no longer be rebuilt or its weights have other names."""


class CheckpointMetadata(Callback):
    """Writes the resolved config, the class names and the image input into every checkpoint.

    Before training it saves all of it, and the module's hyper-parameters, to memory and reads them back as the scripts
    will (``weights_only=True``): a path, a partial or a config node would be saved without a word and fail only
    when the checkpoint is read.

    Args:
        config: The resolved config as plain containers.
        class_names: Names of the classes in the order of the logits.
        image_input: How an image becomes the network's input.
        overrides: What the command was given on its line, with which it can be resumed.

    Attributes:
        before: What each earlier step of a recipe came to, as plain containers.
        wandb_id: The W&B run that the run goes on in, also where this part of it is tracked elsewhere.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        class_names: Sequence[str],
        image_input: ImageInput,
        overrides: Sequence[str] = (),
    ) -> None:
        self.metadata = {
            "schema": SCHEMA,
            "config": dict(config),
            "class_names": list(class_names),
            "image_input": image_input.to_dict(),
            "overrides": list(overrides),
        }
        self.before: list[dict[str, Any]] = []
        self.wandb_id: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that what will be saved can be loaded.

        Raises:
            ValueError: A value would not load back; the message names its key.
        """
        data = getattr(trainer, "datamodule", None)
        check_loadable(
            {
                "config": self.metadata["config"],
                "hyper_parameters": dict(pl_module.hparams),
                "data": dict(data.hparams) if data is not None else {},
            }
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the metadata."""
        self.wandb_id = wandb_id(trainer) or self.wandb_id
        checkpoint[KEY] = {**self.metadata, "before": self.before, "wandb_id": self.wandb_id}


def read_metadata(checkpoint: Any, path: str) -> dict[str, Any]:
    """Return what a checkpoint carries of its network.

    Args:
        checkpoint: What was read from the file.
        path: The file, for the messages.

    Raises:
        ValueError: It was written by something else than ``train.py``, or by another version of it.
    """
    metadata = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{path} was not written by Cleave's train.py: its network cannot be rebuilt from it; weights from "
            "elsewhere go in by backbone.weights=FILE"
        )
    if (schema := metadata.get("schema")) != SCHEMA:
        raise ValueError(
            f"{path} was written by a train.py of Cleave whose checkpoints have schema {schema}, this one reads schema "
            f"{SCHEMA}: its network cannot be rebuilt from it; train it again with this version"
        )
    return metadata


def check_loadable(values: Mapping[str, Any], prefix: str = "") -> None:
    """Round-trip values through ``torch.save`` and ``torch.load(weights_only=True)``.

    Raises:
        ValueError: A value does not load back; the message names the innermost key, the type and what to use instead.
    """
    if _loads_back(dict(values)):
        return
    for key, value in values.items():
        if isinstance(value, dict):
            check_loadable(value, f"{prefix}{key}.")
        if not _loads_back(value):
            raise ValueError(
                f"{prefix}{key} is a {type(value).__name__}, which a checkpoint saves but does not load back; "
                "use plain numbers, strings, lists and dicts"
            )


def _loads_back(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return False
    return True
