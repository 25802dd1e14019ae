"""A script that fits methods for ten steps each in two processes and in one, and writes down weights and metrics.

    python distributed_methods.py METHOD,METHOD FOLDER

SyncBatchNorm has no CPU form, and what draws depends on the rank, so GroupNorm stands for BatchNorm and nothing draws.
"""

import copy
import functools
import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from cleave.architectures import create_backbone, multi_exit_network, split_network
from cleave.datamodules import Digits
from cleave.lightning_modules import CrossEntropy, ExitsJoint, Frozen, HeadDistillation, Task, Term, Training
from cleave.losses import HeadDistillationLoss, JointExitLoss

GLOBAL_BATCH = 32


class LearnedScale(nn.Module):
    """Squared distance of a learned scale of the student's feature from the teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (self.scale * student - teacher).square().mean()


def without_batchnorm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(4, child.num_features))
        else:
            without_batchnorm(child)
    return module


def build(method: str, classes: int) -> Task:
    torch.manual_seed(0)
    backbone = create_backbone("cifar", "resnet20", num_classes=classes, in_channels=1).network
    backbone = without_batchnorm(backbone)
    sample = torch.randn(2, 1, 8, 8)
    rate = 1e-4 if method == "head_distillation" else 0.05  # its loss is a sum over the feature
    training = Training(optimizer=functools.partial(torch.optim.SGD, lr=rate))
    if method == "joint_exits":
        network = multi_exit_network(backbone, sample, at=["layer1", "layer2"])
        for cut in network.exits[:-1]:
            without_batchnorm(network.inserts_at(cut)[0])
        return ExitsJoint(network, loss=JointExitLoss("branchynet"), training=training)
    settings = {"channels": 4, "width": 8}
    network = split_network(backbone, "layer2", sample, form="insert", bottleneck=settings, codec={"bits": 4})
    without_batchnorm(network.bottlenecks["layer2"])
    if method == "cross_entropy":
        return CrossEntropy(network, loss=nn.CrossEntropyLoss(), training=training)
    others = {"teacher": Frozen(copy.deepcopy(backbone))}
    if method == "head_distillation":
        return HeadDistillation(network, loss=HeadDistillationLoss(), others=others, training=training)
    terms = {"scale": Term(LearnedScale(), of=["student/layer2", "teacher/layer2"])}
    return Task(network, terms, others=others, train=["bottleneck"], training=training)


def main() -> None:
    methods, folder = sys.argv[1].split(","), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for processes in (2, 1):
        for method in methods:
            fit(method, processes, folder)


def fit(method: str, processes: int, folder: Path) -> None:
    data = Digits(batch_size=GLOBAL_BATCH // processes, image_size=8)
    task = build(method, data.num_classes).double()  # what comes back from a fork is loaded into it
    trainer = pl.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp_fork" if processes > 1 else "auto", precision="64-true",
        max_steps=10, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    trainer.validate(task, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        torch.save(task.state_dict(), folder / f"{method}-{processes}.pt")
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        (folder / f"{method}-{processes}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
