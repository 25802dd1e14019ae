"""The base of split training: a split network, its teacher, and the bytes it sends."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from architectures.split import SplitNetwork
from architectures.stages import Stages, cut
from deployment import zstd_bytes
from lightning_modules.base import Batch, Task
from lightning_modules.teacher import Teacher


class SplitTask(Task):
    """Trains a :class:`~architectures.split.SplitNetwork`, with or without a frozen teacher.

    Testing also packs every sample's representation and reports the bytes: ``test/payload_bytes`` as sent,
    ``test/payload_zstd_bytes`` after zstd level 1, and the payload's ratio to the uint8 input, to the float32 feature
    at the cut, and to the image file (below 1 means fewer bytes).

    Args:
        network: The split network to train.
        *args: As of :class:`~lightning_modules.base.Task`.
        teacher: Frozen teacher that maps the same images to logits; cut at the network's own names, so that both give
            features under the same names.
        **kwargs: As of :class:`~lightning_modules.base.Task`.

    Raises:
        CutError: The teacher cannot be cut where the student is.
        TypeError: ``network`` is not a split network.
    """

    network: SplitNetwork
    _teacher: Teacher | None

    def __init__(self, network: SplitNetwork, *args: Any, teacher: Teacher | None = None, **kwargs: Any) -> None:
        if not isinstance(network, SplitNetwork):
            raise TypeError(f"{type(self).__name__} trains a SplitNetwork, got {type(network).__name__}")
        if teacher is not None:
            sample = torch.randn(2, *network.image_shape, generator=torch.Generator().manual_seed(0))
            teacher = Teacher(cut(teacher.network, at=network.names, sample=sample), teacher.path, teacher.sha256)
        self.__dict__["_teacher"] = teacher
        super().__init__(network, *args, **kwargs)
        self.split = network.split
        self.test_payload = MetricCollection(
            {"payload_bytes": MeanMetric(), "payload_zstd_bytes": MeanMetric()}, compute_groups=False
        )

    @property
    def teacher(self) -> Stages:
        """The frozen teacher, cut at the same names as the student."""
        if self._teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher; give teacher.ckpt_path")
        return cast(Stages, self._teacher.network)

    def compiled_modules(self) -> list[nn.Module]:
        """The parts that run one by one: encoder, decoder, the stages of the tail and of the teacher."""
        network = self.network
        parts = [network.head, network.encoder, network.decoder, *network.tail]
        return [p for p in parts if p is not None] + (list(self.teacher) if self._teacher else [])

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device and precision; Lightning does not know of it."""
        if self._teacher is not None:
            self._teacher.to(self.device)
            self.trainer.precision_plugin.convert_module(self._teacher.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which teacher the student learns from."""
        if self._teacher is not None:
            checkpoint["teacher"] = self._teacher.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another teacher."""
        if self._teacher is not None and "teacher" in checkpoint:
            self._teacher.check(checkpoint["teacher"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure accuracy and the bytes sent on a test batch."""
        super().test_step(batch, batch_idx)
        payloads = self.network.codec.encode(self.network.codes(batch[0]))
        for name, length in (("payload_bytes", len), ("payload_zstd_bytes", zstd_bytes)):
            self.test_payload[name].update(torch.tensor([float(length(p)) for p in payloads], device=self.device))

    def on_test_epoch_end(self) -> None:
        """Log accuracy, bytes and their ratios."""
        super().on_test_epoch_end()
        measured = self.test_payload.compute()
        self.test_payload.reset()
        sizes = self.network.sizes() | self._file_bytes()
        ratios: dict[str, Tensor] = {f"payload_to_{n}": measured["payload_bytes"] / size for n, size in sizes.items()}
        self.log_dict({f"test/{name}": value for name, value in (measured | ratios).items()}, sync_dist=True)

    def _file_bytes(self) -> dict[str, float]:
        data: Any = getattr(self.trainer, "datamodule", None)
        return {"file": data.image_file_bytes("test")} if hasattr(data, "image_file_bytes") else {}
