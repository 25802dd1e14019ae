"""A new insert, a new term and a new evaluator in one short file, with exits and a bottleneck."""

import functools
import math

import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics import MeanMetric

from cleave.architectures import Insert, create_backbone, staged_network
from cleave.architectures.partitions import network_partitions
from cleave.datamodules import Digits
from cleave.deployment import OutputSpec, Pipeline, export_bundle
from cleave.lightning_modules import Evaluator, Task, Term, Training
from cleave.losses import JointExitLoss


class FeatureNoise(Insert):
    """Adds noise of a learned deviation to each channel in training, and emits the deviation for each sample."""

    kind, emits = "noise", ("deviation",)

    def __init__(self, channels):
        super().__init__()
        self.log_deviation = nn.Parameter(torch.full((channels, 1, 1), math.log(0.1)))

    def forward(self, x):
        deviation = self.log_deviation.exp().expand_as(x)
        return (x + deviation * torch.randn_like(x) if self.training else x), deviation


class NoiseReward(nn.Module):
    """Rewards noise, as it hides the input: the negative mean logarithm of the deviation."""

    def forward(self, deviation):
        return -deviation.log().mean()


class Deviation(Evaluator):
    """Mean deviation of the noise."""

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def needs(self, stage, network):
        return ["layer2/deviation"]

    def update(self, stage, passed):
        self.mean.update(passed["layer2/deviation"])

    def compute(self, stage):
        return {"deviation": self.mean.compute()}


def test_a_new_insert_a_new_term_and_a_new_evaluator(tmp_path):
    data = Digits(batch_size=64, image_size=8)
    backbone = create_backbone("cifar", "resnet20", num_classes=10, in_channels=1).network
    split = {"split": "layer2", "form": "insert", "bottleneck": {"channels": 3, "width": 8}, "codec": {"bits": 4}}
    inserts = {"layer2": [FeatureNoise(32)]}
    network = staged_network(backbone, torch.randn(2, 1, 8, 8), exits=["layer1", "layer3"], inserts=inserts, **split)
    exits = Term(JointExitLoss(), of=["student/exits", "labels", "progress"])
    terms = {"exits": exits, "noise": Term(NoiseReward(), of=["student/layer2/deviation"], weight=0.1)}
    training = Training(optimizer=functools.partial(torch.optim.AdamW, lr=1e-2))
    task = Task(network, terms, training=training, evaluators=[Deviation()])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=4, limit_val_batches=1, **quiet)
    trainer.fit(task, datamodule=data)
    assert trainer.test(task, datamodule=data, verbose=False)[0]["test/deviation"] > 0.1
    found = network_partitions(network.eval(), data.input)
    outputs = [OutputSpec("logits", "logits", (10,), tuple(data.class_names))]
    images = data.sample_batch("test", 4)["images"]
    sample = {"input": data.input, "outputs": outputs, "images": images}
    bundle = export_bundle(tmp_path / "bundle", found.parts, found.edges, exits=found.exits, **sample)
    expected = network(data.input.normalize(images))
    assert torch.allclose(Pipeline(bundle).run(images).logits, expected, atol=1e-5)
