"""A new insert, a new term and a new evaluator in one short file, with exits and a bottleneck."""

import torch
from torch import nn
from torchmetrics import MeanMetric

from cleave.architectures import Insert, create_backbone, staged_network
from cleave.datamodules import Digits
from cleave.lightning_modules import Evaluator, Task, Term
from cleave.losses import JointExitLoss

from .training_helpers import bundle_outputs, quiet_trainer


class FeatureNoise(Insert):
    """Adds noise of a learned deviation to each channel in training, and emits the deviation for each sample."""

    kind, emits = "noise", ("deviation",)

    def __init__(self, channels):
        super().__init__()
        self.log_deviation = nn.Parameter(torch.full((channels, 1, 1), -2.0))

    def forward(self, x):
        deviation = self.log_deviation.exp().expand_as(x)
        return (x + deviation * torch.randn_like(x) if self.training else x), deviation


class NoiseReward(nn.Module):
    """Rewards noise, as it hides the input: the negative mean logarithm of the deviation."""

    def forward(self, deviation):
        return -deviation.log().mean()


class Deviation(Evaluator):
    def bind(self, network, trained):
        self.mean = MeanMetric()

    def needs(self, stage, network):
        return ["layer2/deviation"]

    def update(self, stage, passed):
        self.mean.update(passed["layer2/deviation"])

    def compute(self, stage):
        return {"deviation": self.mean.compute()}


def test_a_new_insert_a_new_term_and_a_new_evaluator(tmp_path):
    data, backbone = Digits(image_size=8), create_backbone("cifar", "resnet20", 10, in_channels=1).network
    new = {"exits": ["layer1", "layer3"], "form": "insert", "inserts": {"layer2": [FeatureNoise(32)]}}
    network = staged_network(backbone, torch.randn(2, 1, 8, 8), split="layer2", codec={"bits": 4}, **new)
    of = ["student/exits", "labels", "progress"]
    terms = {"exits": Term(JointExitLoss(), of=of), "noise": Term(NoiseReward(), of=["student/layer2/deviation"])}
    trainer, task = quiet_trainer(max_epochs=1, limit_train_batches=4), Task(network, terms, evaluators=[Deviation()])
    trainer.fit(task, datamodule=data)
    assert trainer.test(task, datamodule=data, verbose=False)[0]["test/deviation"] > torch.tensor(-2.0).exp()
    found, expected = bundle_outputs(network, data, tmp_path / "bundle")
    assert torch.allclose(found, expected, atol=1e-5)
