"""Room for other tasks: per-pixel classes on the digits, with a loss and an evaluator of this file alone."""

import functools

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from cleave.architectures import split_network
from cleave.architectures.partitions import network_partitions
from cleave.datamodules import Digits
from cleave.deployment import ENVELOPE_BYTES, OutputSpec, Pipeline, export_bundle, load_bundle
from cleave.lightning_modules import Evaluator, Task, Term, Training

CLASSES = 3  # paper, grey, ink


class MaskedDigits(Digits):
    """Digits with the class of every pixel: how dark it is."""

    parts = (*Digits.parts, "mask")

    def further_parts(self, split, source):
        pixels = np.stack([np.asarray(source.picture(index)) for index in range(len(source))])
        darkness = pixels.repeat(2, axis=1).repeat(2, axis=2)  # the digits have 8 rows, the network sees 16
        return {"mask": (darkness > 40).astype(np.int64) + (darkness > 160)}


class Segmenter(nn.Module):
    """Maps images (B, 1, H, W) to logits of every pixel (B, classes, H, W)."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.ConvTranspose2d(16, CLASSES, 2, stride=2)

    def forward(self, x):
        return self.head(self.body(self.down(x)))


class PixelCrossEntropy(nn.Module):
    """Cross entropy of every pixel."""

    def forward(self, logits, mask):
        return F.cross_entropy(logits, mask)


class MeanIoU(Evaluator):
    """Mean intersection over union."""

    shown = ("iou",)

    def __init__(self):
        super().__init__()
        self.iou = MulticlassJaccardIndex(CLASSES)

    def needs(self, stage, network):
        return ["logits"]

    def update(self, stage, passed):
        self.iou.update(passed["logits"].argmax(1), passed["mask"])

    def compute(self, stage):
        return {"iou": self.iou.compute()}

    def monitor(self, trained):
        return "val/iou"


def test_a_dense_network_trains_is_exported_and_runs(tmp_path):
    torch.manual_seed(0)
    data = MaskedDigits(batch_size=64, image_size=16)
    sample = torch.randn(2, 1, 16, 16)
    network = split_network(
        Segmenter(), "down", sample, form="insert", bottleneck={"channels": 4, "width": 8}, codec={"bits": 6}
    )
    training = Training(optimizer=functools.partial(torch.optim.AdamW, lr=1e-2))
    terms = {"pixels": Term(PixelCrossEntropy(), of=["student/logits", "mask"])}
    task = Task(network, terms, training=training, evaluators=[MeanIoU()])
    assert task.monitor == "val/iou"
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, **quiet)
    before = pl.Trainer(accelerator="cpu", **quiet).validate(task, datamodule=data, verbose=False)[0]["val/iou"]
    trainer.fit(task, datamodule=data)
    after = trainer.test(task, datamodule=data, verbose=False)[0]["test/iou"]
    assert after > before + 0.2

    found = network_partitions(network.eval(), data.input)
    images = data.sample_batch("test", 4)["images"]
    outputs = [OutputSpec("logits", "map", (CLASSES, 16, 16), ("paper", "grey", "ink"))]
    export_bundle(tmp_path / "bundle", found.parts, found.edges, input=data.input, outputs=outputs, images=images)
    result = Pipeline(load_bundle(tmp_path / "bundle")).run(images)
    expected = network(data.input.normalize(images))
    torch.testing.assert_close(result.logits, expected, rtol=1e-4, atol=1e-4)
    assert result.payload_bytes == [ENVELOPE_BYTES + 4 * 8 * 8 * 6 // 8] * 4
