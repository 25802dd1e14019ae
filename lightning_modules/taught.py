"""What tasks with a frozen teacher or frozen parts share: the teacher's place, and its and their stored outputs."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures.modes import evaluating
from cleave.datamodules import ImageDataModule
from cleave.lightning_modules.base import Task
from cleave.lightning_modules.teacher import Teacher


class TaughtTask(Task):
    """A task that may learn from a frozen teacher, and may store what frozen parts make of the training images.

    Args:
        *args: As of :class:`~cleave.lightning_modules.base.Task`.
        feature_cache: ``use``: whether to compute once what frozen parts make of the training images; and
            ``directory``, ``dtype`` and ``views`` of :meth:`~cleave.datamodules.ImageDataModule.cache_features`.
        **kwargs: As of :class:`~cleave.lightning_modules.base.Task`.
    """

    trained_parts: tuple[str, ...]
    _teacher: Teacher | None = None

    def __init__(self, *args: Any, feature_cache: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feature_cache = dict(feature_cache or {})

    @abc.abstractmethod
    def frozen_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return what can be stored of images (B, C, H, W): outputs of frozen parts and of the teacher, by name."""

    @abc.abstractmethod
    def frozen_sources(self) -> tuple[Sequence[nn.Module], Any]:
        """Return the frozen modules that :meth:`frozen_features` runs, and which outputs it takes, as plain values.

        No module means that there is nothing to store.
        """

    def caches_images(self) -> bool:
        """Whether training needs the images beside what is stored."""
        return True

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device and precision, of which Lightning does not know; fill the cache."""
        if self._teacher is not None:
            self._teacher.to(self.device)
            self.trainer.precision_plugin.convert_module(self._teacher.network)
        if self.feature_cache.get("use"):
            self._cache_frozen()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which teacher the student learns from."""
        if self._teacher is not None:
            checkpoint["teacher"] = self._teacher.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another teacher."""
        if self._teacher is not None and "teacher" in checkpoint:
            self._teacher.check(checkpoint["teacher"])

    def _cache_frozen(self) -> None:
        settings = {key: value for key, value in self.feature_cache.items() if key != "use"}
        if not self.frozen_sources()[0]:
            raise ValueError(
                f"feature_cache.use=true: {type(self).__name__} with train={list(self.trained_parts)} has no frozen "
                "part before what it trains; freeze what comes first, or leave the cache out"
            )
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise ValueError("feature_cache.use=true needs a data module of Cleave's, whose images it can go through")
        with evaluating(self.network):  # for now alone: Lightning has yet to look at the modes
            data.cache_features(
                self.frozen_features,
                self.frozen_digest(),
                images=self.caches_images(),
                device=self.device,
                **settings,
            )

    def frozen_digest(self) -> str:
        """Digest of all that :meth:`frozen_features` depends on: outputs, weights and running statistics."""
        modules, outputs = self.frozen_sources()
        digest = hashlib.sha256(json.dumps(outputs).encode())
        for module in modules:
            digest.update(str(module).encode())
            for name, value in module.state_dict().items():
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
